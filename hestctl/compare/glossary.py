"""What the columns of a report mean. A column is not shown without its line here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

METHODS: Final[Mapping[str, str]] = {
    "hest": "spectral adapters (R directions a layer) and, in scope network, every attention and MLP block "
    "of the backbone off, int8 or full, all chosen by learned gates under an energy budget; the number is "
    "the budget E_max as a ratio of what tabs spends",
    "tabs": "the same adapters, each layer's directions gated token by token by a linear controller of its "
    "own; no budget, full precision",
    "bhsp": "the same adapters with one fixed gate a direction; no budget, full precision",
    "lora": "LoRA on the query and value projections, merged into the weights for generation",
    "base": "the backbone as it is, not fine-tuned",
}
"""What the methods are, in the order of print."""

KINDS: Final[Mapping[str, str]] = {
    "control": "precision fixed beforehand, to tell choosing from quantising: all layers in int8, the last "
    "layers off, or blocks chosen greedily by sensitivity",
    "ablation": "hest without one part: no dual (a fixed penalty in place of the multiplier), unfactorised "
    "(a controller in every layer), fp16-only (no int8 state)",
}

GAP_COLUMNS: Final[Mapping[str, str]] = {
    "configuration": "a method with its budget and its ablations, whatever the seed",
    "against": "the configuration it is compared with, over the samples that both generated",
    "gap %": "percent fewer joules per sample; given only where the joules are measured and the quality "
    "is not inferior. Negative: more joules",
    "by length": "the part of the gap, in percent of joules, that is due to fewer or more new tokens",
    "by token": "the part of the gap that is due to fewer or more joules a token",
    "time ratio": "wall time of the configuration over wall time of the other; time is not energy",
    "quality difference": "points of the score, configuration minus other, mean over samples",
    "quality": "not inferior: the whole interval lies above minus the margin; inferior: wholly below it; "
    "inconclusive: neither",
    "verdict": "less energy at equal quality; less energy, worse quality; more energy; no difference; or "
    "inconclusive",
    "joules ratio": "joules of the configuration over joules of the other, whatever their quality",
    "least detectable saving": "the true saving in percent that so many samples and seeds would show as one "
    "with 80 % power",
    "at equal length": "the verdict where both wrote equally many tokens, else the nearest that can be said",
    "least detectable": "the smallest true difference in points that so many samples would show with 80 % "
    "power",
    "p99 ratio": "99th percentile of latency over that of the other; needs 100 batches",
    "controller parameters": "trained numbers that decide about states, configuration : other",
    "over E_max": "share of the configuration's samples whose predicted joules exceed the budget",
    "worst of E_max": "the sample with the most predicted joules, in percent of its budget",
    "repaid after": "generated samples after which the joules saved outweigh the joules that its training "
    "spent more",
    "adjusted p": "one-sided p-value of less energy at equal quality, the larger of that of energy and that "
    "of quality, after Holm over its family: all pairs with baselines and controls, with ablations, or with "
    "base",
    "samples": "test samples that both sides hold; each is compared with itself",
    "role": "baseline (tabs, bhsp, lora), control (any method on fixed int8 or skipped layers, or hest's "
    "blocks chosen greedily), or ablation (hest without a part of it)",
}
"""The columns of the gap table, in its order."""

_OF_JOULES: Final = (
    *("gap %", "by length", "by token", "joules ratio", "least detectable saving"),
    *("at equal length", "repaid after", "adjusted p", "verdict"),
)


def gap_columns(measured: bool) -> list[str]:
    """The columns that are shown: those of joules only where these are measured."""
    return [name for name in GAP_COLUMNS if measured or name not in _OF_JOULES]


MEASURES: Final[Mapping[str, str]] = {
    "energy_j_per_sample": "what the meter says of a sample's generation, gross: the idle draw is in it",
    "energy_net_j_per_sample": "the same less the idle draw that the meter's certificate found",
    "energy_error_j_per_sample": "the meter's own bound on the joules of one sample",
    "prefill_j_per_sample": "the part of a sample's joules that reading the prompt took, by the energy "
    "model's proportion",
    "decode_j_per_sample": "the part that writing took, by the same proportion",
    "energy_j_per_new_token": "joules of all samples over all their new tokens",
    "new_tokens_per_sample": "tokens written a sample; a method that learns to stop spends less by that "
    "alone",
    "latency_p50_s": "median of the wall time of a sample's batch",
    "latency_p99_s": "99th percentile of that; needs 100 batches",
    "tokens_per_s": "new tokens of a batch over its wall time",
    "rouge_lsum": "the primary score: longest common subsequence by sentence, F1 x 100",
    "rouge_l": "longest common subsequence of the whole text, F1 x 100",
    "rouge1": "common words, F1 x 100",
    "rouge2": "common pairs of words, F1 x 100",
    "accuracy_percent": "answers equal to the true label",
    "chance_percent": "what always giving the most frequent label would reach",
    "answer_nll_nats": "negative log-likelihood of the reference answer, a token",
    "scope_energy_j_per_sample": "joules of what the budget counts, predicted from the energy table and the "
    "states that ran",
    "emax_j_per_sample": "the budget E_max of a sample, mean",
    "emax_use_percent": "scope joules of a sample in percent of its E_max, mean",
    "emax_use_worst_percent": "the same of the sample that used most of it",
    "over_budget_percent": "share of samples whose predicted joules, from the states that ran, exceed E_max",
    "meter_of_predicted_percent": "what the meter says in percent of what the energy table predicts; far "
    "from 100, either of them is wrong",
    "meter_of_emax_percent": "what the meter says in percent of the budget: above 100, the budget is kept by "
    "prediction only",
    "controller_parameters": "trained numbers that decide about states",
    "adapter_parameters": "trained numbers of the adapters, controller apart",
    "train_energy_j": "joules that training spent",
    "train_time_s": "wall time that training took",
}
"""Every measure of a row, by its key."""

TERMS: Final[Mapping[str, str]] = {
    "measured, estimated, predicted": "measured: an energy counter of the device; estimated: CPU time times "
    "nominal watts, or a replayed trace, good for no saving; predicted: the energy table applied to states",
    "scope": "what a budget counts: adapter, the spectral directions alone; network, the whole generation "
    "with every layer's attention and MLP",
    "E_max": "the energy budget of one sample in joules, as a ratio of what tabs spends or outright",
    "[95 %]": "a 95 % interval; `open`: the data end before the interval does",
    "seeds": "trainings of one configuration that differ in their random numbers alone",
    "not measured": "no number can be supported; the reason stands beside it",
}
