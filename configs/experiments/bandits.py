"""DPO against policies optimised on a fitted reward, on bandits; with and without further states.

    python -m jaxpref.experiments --config=configs/experiments/bandits.py:quick --workdir=W

Source: Li, Xu and Yu 2023 (arXiv 2312.10584). `quick` has the study's own numbers of further
states; without it the gap over the number of further states is measured as well.
"""

from ml_collections import ConfigDict

from jaxpref.experiments import Claim, Diagram, Experiment, Published, bandit_study, is_small

SIZES = ("full", "quick")
MATCHED, MISMATCHED, NEURAL = "matched", "mismatched", "neural"


def get_config(size: str = "full") -> ConfigDict:
    """The settings of `bandit_study.jobs`."""
    quick = is_small(size, SIZES)
    extra = (25,) if quick else (25, 100, 250, 500)
    return ConfigDict({"seeds": 1_000, "extra": extra, "extra_seeds": 200, "seed": 0}).lock()


# Means and standard errors over the ten published seeds, by the published code.
OFFICIAL = {
    MATCHED: {"dpo": (0.0912, 0.0099), "rmb_po": (0.1156, 0.0608), "rmb_po_plus": (0.0929, 0.0453)},
    MISMATCHED: {
        "dpo": (0.4928, 0.0202),
        "rmb_po": (0.3088, 0.0427),
        "rmb_po_plus": (0.3025, 0.0367),
    },
    NEURAL: {
        "dpo": (0.4313, 0.0534),
        "rmb_po": (0.3504, 0.0746),
        "rmb_po_plus": (0.2746, 0.1046),
    },
}


def get_experiment(config: ConfigDict, workdir: str) -> Experiment:
    """The record."""
    settings: dict[str, dict] = {
        MATCHED: {"setting": "linear", "features": "matched"},
        MISMATCHED: {"setting": "linear", "features": "mismatched"},
        NEURAL: {"setting": "neural", "further states": config.extra[0]},
    }

    def of(setting: str, method: str) -> dict:
        return {**settings[setting], "method": method}

    def smaller(text: str, setting: str, better: str, worse: str) -> Claim:
        return Claim(text, "gap", of(setting, worse), of(setting, better))

    return Experiment(
        title="Bandits: the optimality gap of DPO, RMB-PO and RMB-PO+",
        source="Li, Xu and Yu 2023 (arXiv 2312.10584), section 4.",
        jobs=bandit_study.jobs(**config),
        figure=[
            Diagram("linear", "features", "gap", where={"setting": "linear"}, joined=False),
            Diagram(
                "neural, over the further states of RMB-PO+",
                "further states",
                "gap",
                where={"setting": "neural"},
                log_x=True,
            ),
        ],
        claims=[
            smaller(
                "With matched features DPO has a smaller gap than RMB-PO (the published ten seeds)",
                MATCHED,
                "dpo",
                "rmb_po",
            ),
            smaller(
                "With mismatched features RMB-PO has a smaller gap than DPO",
                MISMATCHED,
                "rmb_po",
                "dpo",
            ),
            smaller(
                "With mismatched features further states make the gap of RMB-PO smaller",
                MISMATCHED,
                "rmb_po_plus",
                "rmb_po",
            ),
            smaller("With networks RMB-PO has a smaller gap than DPO", NEURAL, "rmb_po", "dpo"),
            smaller(
                "With networks further states make the gap of RMB-PO smaller",
                NEURAL,
                "rmb_po_plus",
                "rmb_po",
            ),
            smaller(
                "They still do where RMB-PO has as many updates",
                NEURAL,
                "rmb_po_plus",
                "rmb_po_equal_updates",
            ),
        ],
        published=[
            Published(of(setting, method), "gap", *found)
            for setting, methods in OFFICIAL.items()
            for method, found in methods.items()
        ],
    )
