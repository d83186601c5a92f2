// The page of a run: what has changed comes as server-sent events; when there are none to be had, by asking.
"use strict";

(() => {
  const run = document.querySelector("article.run");
  if (!run) return;
  const told = document.getElementById("run-told");
  const state = () => document.getElementById("run-state");
  const SPOKEN = 1000; // milliseconds between sentences, which a screen reader reads out
  const ASKED = 2000; // milliseconds between questions

  let next = "";
  let timer = 0;
  const say = (sentence) => {
    next = sentence;
    if (timer) return;
    const speak = () => {
      timer = 0;
      if (told.textContent === next) return;
      told.textContent = next;
      timer = setTimeout(speak, SPOKEN);
    };
    speak();
  };

  const duration = (seconds) => {
    if (seconds < 10) return `${seconds.toFixed(1)} s`;
    const minutes = Math.floor(Math.round(seconds) / 60);
    const rest = Math.round(seconds) % 60;
    if (minutes < 60) return minutes ? `${minutes} min ${rest} s` : `${rest} s`;
    return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
  };

  let clock = null; // seconds and when they were so
  const count = (seconds) => { clock = { seconds, at: performance.now() }; };
  setInterval(() => {
    const shown = document.getElementById("run-elapsed");
    if (shown && clock && state().hasAttribute("data-open")) {
      shown.textContent = duration(Math.round(clock.seconds + (performance.now() - clock.at) / 1000));
    }
  }, 1000);

  const refresh = async () => {
    const answer = await fetch(run.dataset.state, { headers: { "x-requested-with": "runs.js" } });
    if (!answer.ok) throw new Error(`status ${answer.status}`);
    const found = new DOMParser().parseFromString(await answer.text(), "text/html").getElementById("run-state");
    const focused = document.activeElement && document.activeElement.id;
    const parts = [...state().querySelectorAll("details")].map((part) => part.open);
    found.querySelectorAll("details").forEach((part, i) => { if (i in parts) part.open = parts[i]; });
    state().replaceWith(found);
    if (focused && focused.startsWith("run-")) (document.getElementById(focused) || told).focus();
    say(found.dataset.told);
    begin();
  };

  const show = (now) => {
    say(now.told);
    const here = state();
    const bar = document.getElementById("run-bar");
    const started = now.status === "running" && !document.getElementById("run-elapsed");
    const stopping = now.stopping && document.getElementById("run-cancel");
    if (started || stopping || now.judged !== Number(here.dataset.judged)) {
      here.dataset.judged = now.judged;
      refresh().catch(() => {});
      return;
    }
    count(now.elapsed);
    if (now.status === "queued" || !bar) return;
    if (now.total) {
      bar.max = now.total;
      bar.value = now.done;
    } else {
      bar.removeAttribute("value");
    }
  };

  const ask = () => setTimeout(async () => {
    await refresh().catch(() => {});
    if (state().hasAttribute("data-open")) ask();
  }, ASKED);

  const begin = () => {
    const shown = document.getElementById("run-elapsed");
    count(shown ? Number(shown.dataset.seconds) : 0);
  };

  told.tabIndex = -1; // so that it can take the focus of a button that goes away
  begin();
  if (!state().hasAttribute("data-open")) return;
  const events = new EventSource(run.dataset.events);
  events.addEventListener("progress", (event) => show(JSON.parse(event.data)));
  events.addEventListener("done", () => {
    events.close();
    refresh().catch(() => location.reload());
  });
  events.addEventListener("error", () => {
    if (events.readyState === EventSource.CLOSED) ask(); // refused: too many readers
  });
  addEventListener("pageshow", (event) => { if (event.persisted) location.reload(); });
  addEventListener("pagehide", () => events.close());
})();
