// Search, filters and order of the listing where no server answers: what search-index.js holds is looked through here,
// and the rows that the page already has are shown, hidden, reordered and marked. Text is only ever set as text.
(() => {
  "use strict";

  const { common, papers } = globalThis.searchIndex;
  const WEIGHTS = { title: 10, names: 6, summary: 3, facts: 2, claims: 1, reference: 1 };
  const SHOWN = ["summary", "names", "claims", "reference"]; // what a row can show below its title
  const FILTERS = ["field", "status", "verdict", "listing"];
  const SNIPPET = 240; // characters of a text that is not shown whole
  const PREFIX = 0.7; // what the beginning of a word is worth, against the whole word
  const FAMILY = 0.4; // and what another ending is: regularizer for regularized

  const form = document.getElementById("filters");
  const results = document.getElementById("results");
  const count = document.getElementById("count");
  if (!form || !results || !count) return;

  // ------------------------------------------------------------------------------------------------------------------
  // Words

  const WORD = /[\p{L}\p{N}]+/gu;
  const PART = /[A-Z][A-Z0-9]*(?=[A-Z][a-z])|[A-Z]?[a-z0-9]+|[A-Z0-9]+/g; // the words in a Python name

  // lower case, without accents, American spelling as the British one: regularize as regularise
  const folded = (text) =>
    text.normalize("NFKD").replace(/\p{M}/gu, "").toLowerCase().replace(/(?<=\w{3})iz(?=\w)/g, "is");

  const words = (text) => [...text.matchAll(WORD)].map((found) => folded(found[0]));

  const stem = (word) => word.replace(/(?<=\p{L}{4})(ations?|ings?|ers?|ed|es|e|s)$/u, "");

  const fits = (word, term) => word.startsWith(stem(term));

  const stopped = new Set(common);
  const index = Object.entries(papers).map(([slug, paper], place) => {
    const fields = {};
    for (const name of Object.keys(WEIGHTS)) {
      const text = name === "names" ? `${paper.names} ${(paper.names.match(PART) || []).join(" ")}` : paper[name];
      fields[name] = new Set(words(text));
    }
    return { slug, paper, place, fields };
  });
  const rarity = new Map(); // every word that occurs, and in how many papers
  for (const { fields } of index) {
    for (const word of new Set(Object.values(fields).flatMap((found) => [...found]))) {
      rarity.set(word, (rarity.get(word) || 0) + 1);
    }
  }

  function terms(query) {
    const typed = [...new Set(words(query))].slice(0, 20);
    const telling = typed.filter((word, i) => i === typed.length - 1 || !stopped.has(word));
    return telling.length ? telling : typed;
  }

  // The words that a term may mean, and what each is worth: rare ones more than common ones, the term itself more than
  // words that it begins, these more than words that only share its stem.
  function meant(term) {
    const found = [];
    for (const [word, count] of rarity) {
      if (!fits(word, term)) continue;
      const share = word === term ? 1 : word.startsWith(term) ? PREFIX : FAMILY;
      found.push([word, share * Math.log(1 + index.length / count)]);
    }
    return found.sort((a, b) => b[1] - a[1]);
  }

  // What a paper is worth for a term: in every field the best word counts, in the title most.
  function worth(fields, candidates) {
    let sum = 0;
    for (const [name, weight] of Object.entries(WEIGHTS)) {
      const best = candidates.find(([word]) => fields[name].has(word));
      if (best) sum += weight * best[1];
    }
    return sum;
  }

  // Papers with all the terms, best first; where there are none, papers with any of them.
  function search(asked) {
    const candidates = asked.map(meant);
    const scored = index.map((row) => ({ ...row, parts: candidates.map((words) => worth(row.fields, words)) }));
    const all = scored.filter((row) => row.parts.every((part) => part > 0));
    const any = all.length ? all : scored.filter((row) => row.parts.some((part) => part > 0));
    const total = (row) => row.parts.reduce((sum, part) => sum + part, 0);
    return asked.length ? any.sort((a, b) => total(b) - total(a) || a.place - b.place) : [];
  }

  // ------------------------------------------------------------------------------------------------------------------
  // Rows

  const dates = [...results.querySelectorAll("section")];
  const rows = new Map(); // the first row of each paper
  for (const row of results.querySelectorAll("[data-slug]")) {
    if (!rows.has(row.dataset.slug)) rows.set(row.dataset.slug, row);
  }
  const byDate = new Map([...rows.keys()].map((slug, place) => [slug, place]));

  // The text as nodes, with what matches the terms in <mark>; names match by their inner words too.
  function marked(text, asked) {
    const nodes = [];
    let end = 0;
    for (const found of text.matchAll(WORD)) {
      const inner = [folded(found[0]), ...(found[0].match(PART) || []).map(folded)];
      if (!asked.some((term) => inner.some((word) => fits(word, term)))) continue;
      const mark = document.createElement("mark");
      mark.textContent = found[0];
      nodes.push(text.slice(end, found.index), mark);
      end = found.index + found[0].length;
    }
    return [...nodes, text.slice(end)];
  }

  // How many of the terms a field of a paper has.
  function hits({ fields }, name, asked) {
    return asked.filter((term) => fields[name].has(term) || [...fields[name]].some((word) => fits(word, term))).length;
  }

  // The text that shows best why a paper was found, cut around its first match; where the title says it, the summary.
  function snippet(row, asked) {
    if (hits(row, "title", asked) === asked.length) return row.paper.summary;
    const counts = SHOWN.map((name) => hits(row, name, asked));
    const text = row.paper[SHOWN[counts.indexOf(Math.max(...counts))]];
    if (text === row.paper.summary || text.length <= SNIPPET) return text;
    const first = [...text.matchAll(WORD)].find((word) => asked.some((term) => fits(folded(word[0]), term)));
    const start = text.lastIndexOf(" ", Math.max(0, (first ? first.index : 0) - SNIPPET / 3)) + 1;
    const stop = text.length - start <= SNIPPET ? text.length : text.lastIndexOf(" ", start + SNIPPET);
    return `${start ? "…" : ""}${text.slice(start, stop)}${stop < text.length ? "…" : ""}`;
  }

  function copied(found, asked) {
    const row = rows.get(found.slug).cloneNode(true);
    if (asked.length) {
      row.querySelector("h3 a").replaceChildren(...marked(found.paper.title, asked));
      row.querySelector(".summary").replaceChildren(...marked(snippet(found, asked), asked));
    }
    return row;
  }

  const admits = (state) => ({ paper }) => FILTERS.every((name) => !state[name] || [].concat(paper[name]).includes(state[name]));

  const ORDERS = {
    title: (a, b) => a.paper.title.localeCompare(b.paper.title),
    evidence: (a, b) => b.paper.recorded.localeCompare(a.paper.recorded) || byDate.get(a.slug) - byDate.get(b.slug),
    listed: (a, b) => byDate.get(a.slug) - byDate.get(b.slug),
  };

  function show(state) {
    const asked = state.q ? terms(state.q) : [];
    const found = (state.q ? search(asked) : index).filter(admits(state));
    if (found.length && !state.q && (!state.sort || state.sort === "listed")) {
      showDates(new Set(found.map((row) => row.slug)), state.listing);
    } else {
      if (state.sort in ORDERS) found.sort(ORDERS[state.sort]);
      results.replaceChildren(found.length ? flat(found.map((row) => copied(row, asked))) : nothing());
    }
    const told = found.length === index.length ? `All ${index.length} papers` : `${found.length || "No"} paper${found.length === 1 ? "" : "s"}`;
    count.replaceChildren(state.q ? `${told} for “${state.q}”` : told);
    if (query(state)) count.append(" · ", link("show all"));
  }

  // The sections as they came with the page, without the rows that the filters leave out.
  function showDates(slugs, listing) {
    results.replaceChildren(...dates);
    for (const section of dates) {
      const date = section.querySelector("h2 span").textContent;
      let shown = 0;
      for (const row of section.querySelectorAll("[data-slug]")) {
        row.hidden = !slugs.has(row.dataset.slug);
        shown += !row.hidden;
      }
      section.hidden = !shown || Boolean(listing && listing !== date);
      section.querySelector("h2 small").textContent = `${shown} paper${shown === 1 ? "" : "s"}`;
    }
  }

  function flat(items) {
    const section = document.createElement("section");
    const heading = document.createElement("h2"); // for those who hear the page
    const list = document.createElement("ol");
    heading.className = "hidden";
    heading.textContent = "Papers";
    list.className = "listing";
    for (const item of items) item.hidden = false;
    list.append(...items);
    section.append(heading, list);
    return section;
  }

  function nothing() {
    const told = document.createElement("p");
    told.className = "nothing";
    told.append("No paper is like that. ", link("Show all papers"));
    return told;
  }

  function link(text) {
    const made = document.createElement("a");
    made.href = location.pathname;
    made.textContent = text;
    made.addEventListener("click", (event) => {
      event.preventDefault();
      go({}, true);
      fill({});
    });
    return made;
  }

  // ------------------------------------------------------------------------------------------------------------------
  // The state: in the form, and in the address, so that it can be kept, shared and gone back to

  const controls = [...form.elements, document.getElementById("find")].filter((control) => control && control.name);

  const read = () => Object.fromEntries(controls.map((control) => [control.name, control.value.trim()]));

  const given = () => Object.fromEntries(new URLSearchParams(location.search));

  const query = (state) => new URLSearchParams(Object.entries(state).filter(([, value]) => value)).toString();

  function fill(state) {
    for (const control of controls) {
      control.value = state[control.name] || "";
      if (control.selectedIndex === -1) control.value = ""; // no such choice
    }
  }

  function go(state, step) {
    const address = query(state) ? `?${query(state)}` : location.pathname;
    history[step ? "pushState" : "replaceState"](null, "", address);
    show(state);
  }

  function start() {
    fill(given());
    show(read());
  }

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    go(read(), false);
  });
  for (const control of controls) {
    control.addEventListener(control.type === "search" ? "input" : "change", () => go(read(), control.type !== "search"));
  }
  addEventListener("popstate", start);
  start();
})();
