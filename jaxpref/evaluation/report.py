"""What a finished run shows in the terminal: tables of before and after."""

from typing import Any

from rich.markup import escape
from rich.table import Table

_TITLES = {
    "eval/loss": "loss",
    "eval/rewards/accuracies": "preference accuracy",
    "eval/accuracy": "accuracy",
    "eval/rewards/best_accuracy": "  best possible with these labels",
    "eval/rewards/margins": "implicit reward margin",
    "eval/rewards/rank_correlation": "rank correlation with the true reward",
    "eval/rewards/chosen": "implicit reward, chosen",
    "eval/rewards/rejected": "implicit reward, rejected",
    "eval/margin": "reward margin",
    "eval/mean_reward": "reward",
    "eval/good_reward": "reward, labelled good",
    "eval/bad_reward": "reward, labelled bad",
    "eval/win_rate": "win rate against the reference",
    "eval/samples/reward": "reward of samples",
    "eval/samples/kl": "KL of samples to the reference (nats)",
    "eval/samples/length": "length of samples (tokens)",
    "eval/calibration_error": "expected calibration error",
    "eval/logps/chosen": "log-prob, chosen (nats)",
    "eval/logps/rejected": "log-prob, rejected (nats)",
    "eval/true_reward": "true reward",
    "eval/objective/scores": "learned reward",
    "eval/objective/kl": "KL to the reference (nats)",
    "eval/completions/length": "length (tokens)",
    "eval/completions/clipped_ratio": "share that was cut by length",
}


def closing_table(lines: list[dict[str, float]]) -> Table | None:
    """Held-out values of the first and the last evaluation, side by side.

    Args:
      lines: the run's measurements, as `jaxpref.metrics.read` gives them.

    Returns:
      A table, or None if nothing was evaluated.
    """
    evaluated = [line for line in lines if any(name.startswith("eval/") for name in line)]
    if not evaluated:
        return None
    before, after = evaluated[0], evaluated[-1]
    table = Table(title="Held-out examples")
    table.add_column("")
    table.add_column(f"before (step {before['step']:.0f})", justify="right")
    table.add_column(f"after (step {after['step']:.0f})", justify="right")
    # Other policies were measured once, as `eval/NAME/...`, on the same prompts.
    others = dict.fromkeys(
        key.split("/")[1]
        for line in evaluated[:1]
        for key in line
        if key.startswith("eval/") and key.endswith("/objective/scores") and key.count("/") == 3
    )
    for name in others:
        table.add_column(name, justify="right")
    # A method that samples has these beside the same of all its held-out prompts.
    twice = {name for name in _TITLES if name.startswith("eval/samples/")}
    left_out = twice if "eval/objective/scores" in before else set()
    for name, title in _TITLES.items():
        if name in before and name in after and name not in left_out:
            keys = [name.replace("eval/", f"eval/{other}/", 1) for other in others]
            values = [before[name], after[name], *(before.get(key) for key in keys)]
            table.add_row(title, *("" if x is None else f"{x:.3f}" for x in values))
    return table


def samples_table(lines: list[dict[str, Any]], most: int = 3) -> Table | None:
    """What the policy says to the same held-out prompts before and after.

    Args:
      lines: samples of a run, as it keeps them in `samples.jsonl`.
      most: prompts in the table.

    Returns:
      A table, or None if nothing was sampled.
    """
    steps = sorted({line["step"] for line in lines})
    if not steps:
        return None
    table = Table(title="Samples", show_lines=True)
    table.add_column("prompt")
    rewarded = "objective/scores" in lines[-1]
    with_reward = ", with its reward" if rewarded else ""
    for step in dict.fromkeys((steps[0], steps[-1])):
        table.add_column(f"step {step}{with_reward}")
    first, last = ([x for x in lines if x["step"] == step] for step in (steps[0], steps[-1]))
    for pair in list(zip(first, last, strict=False))[:most]:
        said = dict.fromkeys((line["step"] for line in pair), "")
        for line in pair:
            reward = f" ({line['objective/scores']:.2f})" if rewarded else ""
            said[line["step"]] = _short(line["response"]) + reward
        table.add_row(*map(escape, (_short(pair[0]["prompt"]), *said.values())))
    return table


def _short(text: Any, most: int = 160) -> str:
    """The end of a prompt or the beginning of a response."""
    if isinstance(text, list):
        text = text[-1].get("content", "")
    return repr(text if len(text) <= most else f"{text[:most]} ...")
