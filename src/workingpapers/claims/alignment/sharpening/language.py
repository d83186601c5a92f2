"""SmolLM2-135M-Instruct on small sums, and what drawing and scoring costs."""

from __future__ import annotations

import numpy as np

from workingpapers.claims.alignment.beside_trl import small_llama
from workingpapers.claims.alignment.sharpening.digits import PUBLISHED
from workingpapers.claims.alignment.sharpening.exact import PAPER
from workingpapers.desk.claim import Cell, Row, bars, benchmark, claim, faster, higher, scales, seeds


@claim(
    paper=PAPER,
    says="SmolLM2-135M-Instruct on small sums after two examples: SFT-Sharpening with low-rank adapters makes one draw "
    "more accurate than greedy decoding, than sampling and than training on random own samples of the base, and "
    "raises the base's log-likelihood over that of sampling.",
    published=PUBLISHED,
    grid={
        "prompts": scales(smoke=[], laptop=[], paper=[32]),
        "n": scales(smoke=[], laptop=[], paper=[25]),
        "epochs": scales(smoke=[], laptop=[], paper=[4]),
        "seed": seeds(smoke=5, laptop=5, paper=5),
        "method": ["temperature 1", "greedy", "best of N", "SFT, own samples", "SFT"],
    },
    expect=[
        higher("accuracy", "best of N", than=["temperature 1", "greedy"]),
        higher("accuracy", "SFT", than=["temperature 1", "greedy", "SFT, own samples"]),
        higher("held_out_accuracy", "SFT", than=["temperature 1", "SFT, own samples"]),
        higher("base_loglik", "SFT", than="temperature 1"),
    ],
    plot=bars(x="method", y="accuracy"),
)
def smollm2_sums(cell: Cell) -> Row:
    """Trained on half of the sums; accuracy on these, as in the paper, and on the other half; 4 draws to each."""
    import torch

    from workingpapers.alignment.sharpening import CausalPolicy, SharpeningSFT, sharpen
    from workingpapers.data import smollm2

    model, tokenizer = smollm2()
    ends = [tokenizer.eos_token_id, tokenizer("\n").input_ids[0]]
    model.generation_config.eos_token_id = ends
    sums = [(a, b) for a in range(11, 41) for b in range(2, 10)]
    order = np.random.default_rng(cell.seed).permutation(len(sums))[: 2 * cell.prompts]
    chosen = [sums[place] for place in order]
    texts = [f"3 + 5 = 8\n12 + 9 = 21\n{a} + {b} =" for a, b in chosen]
    prompts = [tokenizer(text).input_ids for text in texts]

    trained, temperature, draws = model, 1.0, 4
    if cell.method.startswith("SFT"):
        n = cell.n if cell.method == "SFT" else 1
        trainer = SharpeningSFT(model, n=n, peft_rank=16, epochs=cell.epochs, max_new_tokens=6, random_state=cell.seed)
        trained = trainer.fit(prompts[: cell.prompts]).model_  # type: ignore[assignment]
    elif cell.method == "greedy":
        temperature, draws = 0.0, 1
    generator = torch.Generator().manual_seed(cell.seed)
    policy = CausalPolicy(trained, max_new_tokens=6, eos_token_id=ends, temperature=temperature, generator=generator)
    if cell.method == "best of N":
        found = sharpen(policy, prompts, cell.n)
        answers = [[response or ends[:1]] for response in found.responses]
    else:
        flat = policy.sample(prompts, draws).responses()
        answers = [flat[start : start + draws] for start in range(0, len(flat), draws)]
    right = np.array(
        [
            [str(a + b) == str(tokenizer.decode(response, skip_special_tokens=True)).strip() for response in several]
            for (a, b), several in zip(chosen, answers, strict=True)
        ]
    )
    scored = CausalPolicy(model, max_new_tokens=6).log_prob(prompts[: cell.prompts], answers[: cell.prompts])
    return {
        "accuracy": float(right[: cell.prompts].mean()),
        "held_out_accuracy": float(right[cell.prompts :].mean()),
        "base_loglik": float(scored.mean()),
    }


# ---------------------------------------------------------------------------------------------------------------- cost


@benchmark(
    paper=PAPER,
    says="The best of n answers with their log-probabilities come faster than from transformers' generate, with a "
    "scoring pass after it or with the logits that it can return.",
    grid={
        "n": scales(smoke=[8], laptop=[16], paper=[16, 64]),
        "contender": ["ours", "generate, then score", "generate with logits"],
    },
    expect=[faster("ours", than=["generate, then score", "generate with logits"])],
    plot=bars(x="n", y="seconds", by="contender"),
    rounds={"smoke": 5, "laptop": 5, "paper": 7},
)
def best_of_n_throughput(cell: Cell) -> Row:
    """8 prompts of 64 tokens, answers of 28 tokens on average and 64 at most; a Llama of width 128 with 4 layers."""
    import torch

    from workingpapers.alignment.sharpening import sharpen

    vocabulary, limit = 4_096, 64
    ends = list(range(vocabulary - vocabulary // 32, vocabulary))  # an untrained model ends with 1/32 at every token
    model = small_llama(vocabulary, eos_token_id=ends, pad_token_id=0).eval()
    prompts = np.random.default_rng(0).integers(1, vocabulary, size=(8, 64))
    if cell.contender == "ours":
        generator = torch.Generator().manual_seed(cell.round)
        with cell.timed():
            found = sharpen(model, prompts.tolist(), cell.n, max_new_tokens=limit, generator=generator)
        return {"loglik": float(found.base_logps.mean())}

    with_logits = cell.contender == "generate with logits"
    ids = torch.from_numpy(prompts)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(cell.round)
        with cell.timed():
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                top_k=0,
                max_new_tokens=limit,
                num_return_sequences=cell.n,
                output_logits=with_logits,
                return_dict_in_generate=True,
            )
            answers = out.sequences[:, ids.shape[1] :]
            ended = torch.isin(answers, torch.tensor(ends))
            drawn = ended.cumsum(1) - ended.long() == 0  # up to and with the first end
            if with_logits:
                logits = torch.stack(out.logits, 1)
            else:
                mask = torch.cat([torch.ones(len(answers), ids.shape[1], dtype=torch.long), drawn.long()], 1)
                scored = model(input_ids=out.sequences, attention_mask=mask, logits_to_keep=answers.shape[1] + 1)
                logits = scored.logits[:, :-1]
            logps = logits.log_softmax(-1).gather(2, answers[..., None]).squeeze(2).masked_fill(~drawn, 0.0).sum(1)
            scores = logps.masked_fill(~ended.any(1), -torch.inf).reshape(len(prompts), cell.n)
            best = scores.max(1).values
    return {"loglik": float(best.mean())}
