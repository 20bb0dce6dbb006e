"""What the experiments are: variants, as flags of train.py, and the seeds that they are run at.

protocols.md says why; each protocol was committed before its reported seeds were run. Each part
below adds to VARIANTS (name -> flags of train.py) and to EXPERIMENTS (name -> variants, seeds).
"""

from __future__ import annotations

TRAINING = {
    "steps": 30,
    "lr": 1e-4,
    "eval_every": 10,
    "eval_rows": 128,
    "save_every": 10,
    "keep": 1,
}
EVALUATION = {"n": 2, "eval_rows": 512, "protocol": "training", "rollout_batch": 256}
NO_CURVE = {"eval_every": 0}

# Reported seeds; others chose what is not a preset's.
EIGHT_SEEDS, THREE_SEEDS, DEVELOPMENT_SEEDS = range(10, 18), range(10, 13), range(3)


# -------------------------------------------------------------- the first protocol: on the dots

# Variants of "regularisation": gamma, learning rate and steps that invite a collapse, and two
# updates per step, so that PPO's clip has something to clip.
LARGE = {"kl_prcp_coef": 0.5, "mini_batch": 8, "lr": 2e-4, "steps": 40}
SINGLE = LARGE | {"entropy_coef": 1.25}  # 2.5 gamma, the ratio of the paper's papo_g 7B
DOUBLE = SINGLE | {"masked_entropy_coef": 1.25}

# Without "algo" a variant is papo_g with the given flags changed.
VARIANTS: dict[str, dict] = {
    "start": {},  # the model before any step: nothing is trained
    "grpo": {"algo": "grpo"},
    "papo_g": {"algo": "papo_g"},
    "dapo": {"algo": "dapo"},
    "papo_d": {"algo": "papo_d"},
    "grpo_no_kl_ref": {"algo": "grpo_no_kl_ref"},
    "papo_g_no_kl_ref": {"algo": "papo_g_no_kl_ref"},
    "gamma_0.1": {"kl_prcp_coef": 0.1},
    "gamma_0.2": {"kl_prcp_coef": 0.2},
    "gamma_0.5": {"kl_prcp_coef": 0.5},
    "gamma_1.0": {"kl_prcp_coef": 1.0},
    "mask_0.4": {"mask_ratio": 0.4},
    "mask_0.8": {"mask_ratio": 0.8},
    "mask_1.0": {"mask_ratio": 1.0},
    "mask_semantic": {"mask_strategy": "semantic"},
    "mask_noise": {"mask_strategy": "noise"},
    "estimator_paper": {"kl_prcp_estimator": "paper"},
    "masked_grad": {"masked_grad": True},
    "large": LARGE,
    "large_no_kl_ref": LARGE | {"kl_ref_coef": 0.0},
    "large_kl_ref_0.1": LARGE | {"kl_ref_coef": 0.1},
    "large_single": SINGLE,
    "large_double": DOUBLE,
    "large_double_grad": DOUBLE | {"masked_grad": True},
    "collapse/large": LARGE,
    "compare/papo_g": NO_CURVE | {"kl_prcp_coef": 0.2},
}
EXPERIMENTS: dict[str, tuple[list[str], range]] = {
    "table1": (["start", "grpo", "papo_g", "dapo", "papo_d"], EIGHT_SEEDS),
    "gamma": (
        ["grpo", "papo_g", "gamma_0.1", "gamma_0.2", "gamma_0.5", "gamma_1.0"],
        THREE_SEEDS,
    ),
    "regularisation": (
        [
            "large",
            "large_no_kl_ref",
            "large_kl_ref_0.1",
            "large_single",
            "large_double",
            "large_double_grad",
        ],
        THREE_SEEDS,
    ),
    "collapse": (["collapse/large"], range(10, 11)),  # for docs/walkthrough.md
    "compare": (["variants/grpo", "compare/papo_g"], EIGHT_SEEDS),  # gamma 0.2
    "no_kl_ref": (["grpo", "grpo_no_kl_ref", "papo_g", "papo_g_no_kl_ref"], THREE_SEEDS),
    "masking": (
        ["papo_g", "mask_0.4", "mask_0.8", "mask_1.0", "mask_semantic", "mask_noise"],
        THREE_SEEDS,
    ),
    "estimator": (["papo_g", "estimator_paper", "masked_grad"], THREE_SEEDS),
}


# ----------------------------------------------------------------- the protocol of the relatives

# The methods of "variants" as published: presets and files of variants/. A method that samples
# under two images gets half of the 8 responses under each.
HALVES = {"group_size": 4}
PUBLISHED: dict[str, dict] = {
    "grpo": {"algo": "grpo"},
    "dapo": {"algo": "dapo"},
    "papo_g": {"algo": "papo_g"},
    "papo_d": {"algo": "papo_d"},
    "vppo": {"algo": "vppo"},
    "pgpo": {"algo": "pgpo"},
    "dvrp": {"algo": "dvrp"},
    "dyco_rl": {"algo": "dyco_rl"},
    "noisy_rollout": {"algo": "noisy_rollout"} | HALVES,
    "noisy_rollout_papo": {"algo": "noisy_rollout", "kl_prcp_coef": 0.02} | HALVES,
    "tapo": {"algo": "tapo"} | HALVES,
    "tor": {"algo": "tor"},
}
# What a method is built on.
BASES = {
    "papo_g": "grpo",
    "dyco_rl": "grpo",
    "noisy_rollout": "grpo",
    "tor": "grpo",
    "papo_d": "dapo",
    "vppo": "dapo",
    "pgpo": "dapo",
    "dvrp": "papo_g",
    "noisy_rollout_papo": "noisy_rollout",
    "tapo": "papo_d",
}
# The further setting, where the toy needs another scale: the weights of KLs to views times one of
# FACTORS, which seeds 0 to 2 choose, ...
FACTORS = (5, 20)
KL_WEIGHTS: dict[str, dict[str, float]] = {
    "papo_g": {"kl_prcp_coef": 0.02},
    "papo_d": {"kl_prcp_coef": 0.01},
    "dvrp": {"kl_prcp_coef": 0.01, "noised_coef": 0.01},
    "noisy_rollout_papo": {"kl_prcp_coef": 0.02},
    "tapo": {"kl_prcp_coef": 0.01},
}
# ... and what counts tokens or steps, fitted to responses of 53 tokens and to 30 steps.
LENGTHS: dict[str, dict] = {
    "dyco_rl": {"shortest_response": 0},
    "noisy_rollout": {"noise_middle": 20},
    "noisy_rollout_papo": {"noise_middle": 20},
}


def methods() -> dict[str, dict]:
    """The names and flags of all settings of "variants"."""
    found = {f"variants/{name}": NO_CURVE | flags for name, flags in PUBLISHED.items()}
    for name, weights in KL_WEIGHTS.items():
        for factor in FACTORS:
            scaled = {flag: round(factor * weight, 4) for flag, weight in weights.items()}
            flags = NO_CURVE | PUBLISHED[name] | LENGTHS.get(name, {}) | scaled
            found[f"variants/{name}_x{factor}"] = flags
    for name in LENGTHS.keys() - KL_WEIGHTS.keys():
        found[f"variants/{name}_scaled"] = NO_CURVE | PUBLISHED[name] | LENGTHS[name]
    return found


VARIANTS |= methods()
EXPERIMENTS |= {
    "variants": ([f"variants/{name}" for name in PUBLISHED], EIGHT_SEEDS),
    "variants_choice": (
        [f"variants/{name}_x{factor}" for name in KL_WEIGHTS for factor in FACTORS],
        DEVELOPMENT_SEEDS,
    ),
    # The factor that "variants_choice" gave each method, and the two without a choice.
    "variants_scaled": (
        [
            "variants/papo_g_x5",
            "variants/papo_d_x5",
            "variants/dvrp_x5",
            "variants/noisy_rollout_papo_x5",
            "variants/tapo_x20",
            "variants/dyco_rl_scaled",
            "variants/noisy_rollout_scaled",
        ],
        EIGHT_SEEDS,
    ),
}


# ---------------------------------- the second protocol: on both tasks, until GRPO has flattened

TASKS = ("dots", "digits")
NEW_SEEDS = range(20, 28)
GAMMAS = (0.05, 0.1, 0.2)
# The choices of the development seeds.
STEPS = 60
GAMMA = 0.1


def on_both_tasks(methods: dict[str, dict]) -> dict[str, dict]:
    return {f"{task}/{name}": flags for task in TASKS for name, flags in methods.items()}


LONG = on_both_tasks({"start": {}, "grpo_long": {"algo": "grpo", "steps": 100}})
VARIANTS |= LONG
EXPERIMENTS["choice_of_steps"] = ([*LONG], DEVELOPMENT_SEEDS)


def papo_at(gamma: float) -> dict:
    return {"algo": "papo_g", "kl_prcp_coef": gamma, "steps": STEPS}


CANDIDATES = on_both_tasks({f"papo_g_{gamma}": papo_at(gamma) for gamma in GAMMAS})
VARIANTS |= CANDIDATES
EXPERIMENTS["choice_of_gamma"] = ([*CANDIDATES], DEVELOPMENT_SEEDS)

METHODS = {
    "grpo": {"algo": "grpo", "steps": STEPS},
    "papo_g": {"algo": "papo_g", "steps": STEPS},
    f"papo_g_{GAMMA}": papo_at(GAMMA),
    "dapo": {"algo": "dapo", "steps": STEPS},
    "papo_d": {"algo": "papo_d", "steps": STEPS},
    f"papo_d_{GAMMA}": {"algo": "papo_d", "kl_prcp_coef": GAMMA, "steps": STEPS},
}
COMPARED = tuple(METHODS)
VARIANTS |= on_both_tasks(METHODS)
for _task in TASKS:
    EXPERIMENTS[_task] = ([f"{_task}/{name}" for name in ("start", *METHODS)], NEW_SEEDS)

# On the dots alone: more gammas, semantic masks of as many patches as dots cover, and collapse.
SALIENT_SHARE = 0.17
ON_DOTS = {
    "papo_g_0.5": papo_at(0.5),
    "papo_g_1.0": papo_at(1.0),
    "random_0.17": papo_at(GAMMA) | {"mask_ratio": SALIENT_SHARE},
    "semantic_0.17": papo_at(GAMMA) | {"mask_ratio": SALIENT_SHARE, "mask_strategy": "semantic"},
    "large": LARGE,
    "large_no_kl_ref": LARGE | {"kl_ref_coef": 0.0},
    "large_kl_ref_0.1": LARGE | {"kl_ref_coef": 0.1},
    "large_single": SINGLE,
    "large_double_grad": DOUBLE | {"masked_grad": True},
}
VARIANTS |= {f"dots/{name}": flags for name, flags in ON_DOTS.items()}
_more = [f"dots/papo_g_{gamma}" for gamma in (*GAMMAS, 0.5, 1.0)]
EXPERIMENTS["more_gammas"] = (["dots/grpo", "dots/papo_g", *_more], NEW_SEEDS)
EXPERIMENTS["semantic"] = (
    [f"dots/papo_g_{GAMMA}", "dots/random_0.17", "dots/semantic_0.17"],
    NEW_SEEDS,
)
EXPERIMENTS["remedies"] = ([f"dots/{name}" for name in ON_DOTS if "large" in name], NEW_SEEDS)

# Semantic masks against grpo once more, at seeds that did not suggest it.
CONFIRMING_SEEDS = range(28, 36)
EXPERIMENTS["confirm"] = (["dots/grpo", "dots/semantic_0.17"], CONFIRMING_SEEDS)

# The same two methods with all weights and with adapters.
ADAPTERS = {"lora_rank": 8, "lr": 1e-3}
LORA = {"grpo": METHODS["grpo"], "semantic_0.17": ON_DOTS["semantic_0.17"]}
LORA |= {f"{name}_r8": flags | ADAPTERS for name, flags in LORA.items()}
VARIANTS |= {f"lora/{name}": flags for name, flags in LORA.items()}
EXPERIMENTS["lora"] = ([f"lora/{name}" for name in LORA], EIGHT_SEEDS)

# Both tasks with start models that perception limits less or more: level -> how often the labels of
# the warm start misread a cell. The tasks themselves have 0.12.
MISREAD = {"easy": 0.04, "hard": 0.2}
_at_levels: dict[str, dict] = {}
for _task in TASKS:
    for _level in MISREAD:
        _at_levels[f"{_task}_{_level}/start"] = {}
        for _method in ("grpo", f"papo_g_{GAMMA}"):
            _at_levels[f"{_task}_{_level}/{_method}"] = METHODS[_method]
VARIANTS |= _at_levels
EXPERIMENTS["difficulty"] = ([*_at_levels], NEW_SEEDS)

# The same runs with other rounding: name -> environment variables of train.py.
ROUNDINGS = {
    "two_threads": {"OMP_NUM_THREADS": "2"},
    "mkl_sse2": {"MKL_CBWR": "COMPATIBLE"},
    "no_avx": {"ATEN_CPU_CAPABILITY": "default"},
    "mkl_sse2_no_avx": {"MKL_CBWR": "COMPATIBLE", "ATEN_CPU_CAPABILITY": "default"},
}
SHORT_ROWS = {"tokens_per_forward": 4096}  # another order of summation
ENVIRONMENTS: dict[str, dict[str, str]] = {}  # variant -> environment variables
ROUNDED: dict[str, dict] = {}
for _method in ("grpo", "papo_g"):
    ROUNDED[f"rounding/{_method}"] = METHODS[_method]
    ROUNDED[f"rounding/{_method}_short_rows"] = METHODS[_method] | SHORT_ROWS
    for _name, _environment in ROUNDINGS.items():
        ROUNDED[f"rounding/{_method}_{_name}"] = METHODS[_method]
        ENVIRONMENTS[f"rounding/{_method}_{_name}"] = _environment
VARIANTS |= ROUNDED
EXPERIMENTS["rounding"] = ([*ROUNDED], range(12, 13))
