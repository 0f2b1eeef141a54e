"""The ancestors' keys and configurations in ours: one row each, with what docs/ancestors.md says of it.

`python -m config.ancestors` prints the tables of that document.
"""

from config import conversions as to
from config.translation import Compose, Dialect, Row, Translation, absent, flag, nothing, renamed, switch

ORIGINAL = [
    Row("arch", "the same. `arch=etrmtrm` is `arch=etrm encoder=iterative`", to.arch),
    Row("arch.name", "`arch=NAME`, with the name of the class's module", to.arch),
    Row(
        "data_paths",
        "`data.path=A`, and `data=arc1_puzzle`, `arc1`, `sudoku` or `maze` unless the line has its own. "
        "`python -m dataset.npy import` reads the ancestors' files. One dataset takes the place of several",
        to.dataset,
        1,
        ("data",),
    ),
    Row("data_paths_test", "`evaluate.py checkpoint=RUN data_path=B`, after the training", to.tested_dataset),
    Row(
        "evaluators",
        "nothing: the dataset decides. Their `pass_Ks` is `evaluation.pass_ks`. No votes are carried over "
        "from an earlier evaluation",
        to.evaluators("evaluation.pass_ks"),
    ),
    Row("epochs", "`train_steps`, as above", to.epochs, 2, ("train_steps",)),
    Row(
        "eval_interval",
        "the same in updates. It is read as epochs beside `epochs` and with a `cfg_` configuration. With "
        "`null` nothing is evaluated in training",
        to.eval_interval,
        2,
        ("train_steps",),
    ),
    switch(
        "run_evaluator_only_at_end", "`eval_interval=${train_steps}`", {"eval_interval": "${train_steps}"}
    ),
    switch(
        "checkpoint_every_eval",
        "always on, and every `checkpoint_interval` updates. `False` is `keep_checkpoints=1`",
        {},
        {"keep_checkpoints": "1"},
    ),
    Row(
        "load_checkpoint",
        "`load_pretrained_decoder=FILE`. Puzzle rows are matched by the puzzles' names, with "
        "`identifiers.json` beside the file. A file of an ETRM gives its recursion only. A checkpoint of "
        "this framework gives its encoder, too: `pretrained_encoder=load`. `resume` continues a run",
        to.load_checkpoint,
        1,
    ),
    Row("checkpoint_path", "`output_dir=DIR`, with a folder in it for each run", to.folder),
    Row("freeze_weights", "`freeze_decoder_steps=all`, for a model with puzzle rows", to.freeze_weights, 1),
    Row("global_batch_size", "the same, but see the next two keys", to.batch),
    Row(
        "effective_batch_size",
        "`global_batch_size`. Their `global_batch_size` over the number of processes is `micro_batch_size`",
        to.accumulated,
        1,
    ),
    Row("grad_accum_steps", "the same, with the product of both as `global_batch_size`", to.accumulated, 1),
    Row(
        "arch.loss.loss_type",
        "`objective=stablemax`, the default of `arch=trm`, or `objective=softmax`, that of `arch=etrm`",
        to.loss_type,
        0,
        ("objective",),
    ),
    renamed("grad_aggregation", "objective.split"),
    renamed("grad_n_groups", "objective.groups"),
    switch(
        "arch.loss.differential_loss",
        "`objective.differential_weight=1`",
        {"objective.differential_weight": "1"},
    ),
    switch("differential_loss", "nothing: it is not read there, either", {}),
    Row(
        "dropout",
        "`arch.dropout`, of what each branch of a block adds. There it is of what each block gives",
        lambda text, line: Translation({"arch.dropout": text}),
    ),
    Row(
        "carry_perturbation_rate",
        "`arch.carry_noise` beside a `grad_aggregation` of `stack_supervisions`, else nothing: the others "
        "ignore it there",
        to.perturbation,
    ),
    switch(
        "custom_sampling",
        "`data.error_weighted=1`, of tasks. There it chooses among the augmentations of a task",
        {"data.error_weighted": "1"},
    ),
    renamed("max_train_groups", "data.max_train_groups"),
    renamed("max_eval_groups", "data.max_eval_groups"),
    Row(
        "arch.H_layers",
        "the same for `hrm` and `transformers_baseline`, else nothing",
        to.if_known("arch.H_layers"),
        1,
    ),
    Row(
        "arch.puzzle_emb_len",
        "the same for puzzle rows, `encoder.output_tokens` for an encoder",
        to.with_encoder("encoder.output_tokens"),
        1,
    ),
    Row("arch.puzzle_emb_ndim", "the same for puzzle rows. No encoder uses it", to.with_encoder(None), 1),
    switch(
        "no_wandb",
        "`logging.wandb=disabled`, the default",
        {"logging.wandb": "disabled"},
        {"logging.wandb": "online"},
    ),
]
ETRM = [
    Row(
        "arch.encoder_type",
        "`encoder=NAME`, with NAME one of `standard`, `variational`, `lpn_standard`, `lpn_variational`, "
        "`lpn_variational_v2`, `hybrid_standard`, `hybrid_variational`, `lpn`, `lpn_var`. The default here "
        "is `memory`",
        to.encoder,
        0,
        ("encoder",),
    ),
    Row(
        "arch.recurrent_encoder_type",
        "`encoder=iterative`, with `encoder.update=read` for `recurrent_standard`. `trm_style` is "
        "`encoder.update=recursive encoder.H_cycles=3 encoder.L_cycles=4 encoder.update_layers=2`",
        to.recurrent_encoder,
        0,
        ("encoder",),
    ),
    renamed("arch.encoder_num_layers", "encoder.num_layers"),
    Row(
        "arch.encoder_pooling_method",
        "`encoder.pooling_method`, which the `lpn` and `hybrid` encoders ignore there",
        to.if_read("encoder.pooling_method", "encoder.pooling_method", "mean", "attention", "weighted"),
        1,
    ),
    Row(
        "arch.encoder_set_layers",
        "`encoder.set_layers`, which only `standard`, `variational` and the `hybrid` encoders read",
        to.if_read("encoder.set_layers", "encoder.aggregator", "queries"),
        1,
    ),
    Row("arch.encoder_layer_scale_init", "`encoder.layer_scale`, with `null` for 0", to.layer_scale),
    renamed("arch.encoder_norm_style", "encoder.norm_style"),
    renamed("arch.encoder_qk_norm", "encoder.qk_norm"),
    Row(
        "arch.lpn_latent_dim",
        "`encoder.latent_dim`, of the encoders that have a bottleneck",
        to.if_read("encoder.latent_dim", "encoder.bottleneck", "demonstration", "aggregate"),
        1,
    ),
    *(
        Row(
            f"arch.encoder_{key}",
            f"`encoder.{name}`, of `trm_style`",
            to.if_read(f"encoder.{name}", "encoder.update", "recursive"),
            1,
        )
        for key, name in (("h_cycles", "H_cycles"), ("l_cycles", "L_cycles"), ("l_layers", "update_layers"))
    ),
    Row(
        "arch.num_act_steps",
        "`mode=fct mode.num_act_steps=N`. An update is one ACT step here. Beside this key the ancestor's "
        "numbers of updates are multiplied by N",
        lambda text, line: Translation({"mode": "fct", "mode.num_act_steps": text}),
        0,
        ("mode",),
    ),
    Row(
        "arch.loss.kl_weight",
        "`objective.kl_weight`, per sample: their value over the batch size, since that is its effect there",
        to.kl_weight,
        2,
    ),
    switch("arch.freeze_encoder", "`freeze_encoder_steps=all`", {"freeze_encoder_steps": "all"}),
    Row("encoder_freeze_steps", "`freeze_encoder_steps`", to.in_batches("freeze_encoder_steps", same=False)),
    Row("freeze_decoder_steps", "the same", to.in_batches("freeze_decoder_steps")),
    Row("lr_warmup_steps", "the same", to.in_batches("lr_warmup_steps")),
    Row(
        "encoder_lr_scale",
        "`encoder_lr`, which is the rate itself, and a tenth of `weight_decay` as `encoder_weight_decay`. "
        "0 is `encoder_lr=null`",
        to.encoder_lr,
        1,
    ),
    renamed("max_demos", "data.max_demos"),
    Row("grad_clip_norm", "the same, on the summed gradient. Off is `null`", to.clip),
    Row(
        "log_predictions_every",
        "`logging.images_interval`",
        to.in_batches("logging.images_interval", same=False),
    ),
    renamed("log_predictions_max_samples", "logging.images_samples"),
]
TRM001 = [
    flag(
        "--fast",
        arch__hidden_size="64",
        arch__num_heads="2",
        arch__L_layers="1",
        arch__H_cycles="1",
        arch__L_cycles="1",
        global_batch_size="4",
        data__max_train_groups="10",
    ),
    flag(
        "--medium",
        arch__hidden_size="256",
        arch__num_heads="4",
        arch__L_layers="2",
        arch__H_cycles="2",
        arch__L_cycles="3",
        global_batch_size="1",
    ),
    renamed("--batch-size", "global_batch_size"),
    flag("--deep-supervision", mode="supervised"),
    flag("--augment", data__augmentation="random"),
    flag("--no-d8", data__augmentation="colours"),
    flag("--no-color", data__augmentation="turns"),
    renamed("--checkpoint-dir", "output_dir"),
    renamed("--resume", "resume"),
    flag("--bf16", arch__forward_dtype="bfloat16"),
    flag("--compile", compile="true"),
    Row(
        "--log-dir",
        "`logging.tensorboard=true`, with event files in the run's folder",
        lambda text, line: Translation({"logging.tensorboard": "true"}),
    ),
    flag("--no-log", logging__tensorboard="false"),
    Row(
        "--patience",
        "`patience=N validation=0.1 keep_best_checkpoints=1`, with an `eval_interval` of one epoch. The "
        "scores are those of held-out training tasks",
        to.patience,
        2,
    ),
    Row("--epochs", "`train_steps`, as above", to.epochs, 2),
    Row("--val-every", "`eval_interval`, in updates", to.in_epochs("eval_interval"), 2),
    Row("--save-every", "`checkpoint_interval`, in updates", to.in_epochs("checkpoint_interval"), 2),
    Row(
        "--no-validate",
        "`validation=null eval_interval=null`, the defaults",
        lambda text, line: Translation({"validation": "null", "eval_interval": "null"}),
        2,
        bare=True,
    ),
    Row(
        "--in-context",
        "nothing: the encoder reads the demonstrations",
        lambda text, line: nothing("the encoder reads them"),
        bare=True,
    ),
]
ABSENT = [
    absent("arch.loss.name", "the loss is `objective`", "losses@actlosshead"),
    absent("arch.act_inference", "`arch.halt_threshold=P` stops an evaluated sample at a probability"),
    absent("arch.no_act", "`arch.act_enabled=false` trains each sample for all steps"),
    absent("arch.rms_norm_eps", "a constant of the code, 1e-5", "1e-5", "1e-05", "0.00001"),
    absent("arch.rope_theta", "a constant of the code, 10000", "10000", "10000.0"),
    absent("min_eval_interval", "evaluations start with the first `eval_interval`"),
    absent("eval_save_outputs", "`evaluate.py save_predictions=true` keeps every answer"),
    absent("log_predictions_crop", "pictures show each grid in its own size", "true"),
    absent("start_step", "`resume` reads it from the checkpoint"),
    absent("in_sweep", "`-m` runs a sweep"),
    absent("intermediate_loss_weight", "`objective.internal_weight` weighs a mean, theirs a sum"),
    absent("--embed-lr", "embeddings learn with `lr`"),
    absent("--train-split", "the dataset says what trains", "training"),
    absent("--val-split", "`validation` holds training tasks out", "evaluation"),
]

_TRM = {
    "arch": "trm",
    "arch.L_cycles": "6",
    "data_paths": "[data/arc-aug-1000]",
    "global_batch_size": "768",
    "epochs": "100000",
    "eval_interval": "10000",
    "lr_warmup_steps": "2000",
    "grad_clip_norm": "0",  # the original clips nothing
    "ema": "false",
}
_TRM_ARC1 = _TRM | {
    "data_paths": "[data/arc1concept-aug-1000]",
    "ema": "true",
    "log_predictions_every": "1000",
    "log_predictions_max_samples": "32",
}
_ETRM = _TRM_ARC1 | {
    "arch": "etrm",
    "arch.encoder_type": "standard",
    "arch.loss.loss_type": "stablemax_cross_entropy",
    "arch.loss.kl_weight": "0.0001",
    "arch.pos_encodings": "rope",
    "data.canvas": "full",  # which `rope` needs
    "data_paths": "[data/arc1concept-encoder-aug-1000]",
    "global_batch_size": "384",
    "grad_clip_norm": "1.0",
    "log_predictions_every": "5000",
}
_ENCODER = _ETRM | {"global_batch_size": "256", "arch.loss.kl_weight": "0.0"}
_ORIGINAL_WEIGHTS = "checkpoints/official_trm/arc_v1_public/step_518071"
_FROZEN = _ETRM | {
    "load_pretrained_decoder": _ORIGINAL_WEIGHTS,
    "freeze_decoder_steps": "999999",
    "encoder_lr_scale": "1.0",
    "global_batch_size": "256",
    "epochs": "20000",
    "max_train_groups": "32",
    "max_eval_groups": "4",
    "lr": "3e-4",
    "lr_warmup_steps": "1000",
    "log_predictions_every": "2000",
}
# What the ancestors' configurations set otherwise than ours, in their keys.
CONFIGS = {
    "cfg_pretrain": _TRM,
    "cfg_pretrain_arc_agi_1": _TRM_ARC1,
    "cfg_pretrain_encoder_original_arc_agi_1": _ENCODER | {"arch.halt_exploration_prob": "0.5"},
    "cfg_pretrain_encoder_arc_agi_1": _ENCODER | {"arch.num_act_steps": "4"},
    "cfg_pretrain_etrm_arc_agi_1": _ETRM,
    "cfg_pretrain_etrmtrm_arc_agi_1": _ETRM
    | {
        "arch": "etrmtrm",
        "arch.recurrent_encoder_type": "recurrent_standard",
        "arch.L_cycles": "4",
        "global_batch_size": "256",
    },
    "cfg_staged_training": _ETRM
    | {
        "project_name": "etrm-staged",
        "load_pretrained_decoder": _ORIGINAL_WEIGHTS,
        "freeze_decoder_steps": "2500",
        "arch.L_cycles": "4",
        "max_eval_groups": "32",
        "epochs": "10000",
        "eval_interval": "5000",
        "global_batch_size": "256",
    },
    "cfg_test_frozen_decoder": _FROZEN,
    "cfg_test_frozen_decoder_corrected": _FROZEN | {"arch.L_cycles": "4", "project_name": "etrm-overfit"},
}
EVALUATION = [
    renamed("load_checkpoint", "checkpoint"),
    Row("data_paths", "`data_path=A`", to.evaluated_dataset),
    Row("data_paths_test", "`data_path=B`, which wins over `data_paths`", to.evaluated_test_dataset),
    renamed("checkpoint_path", "output_dir"),
    renamed("global_batch_size", "batch_size"),
    Row("evaluators", "nothing: the dataset decides. Their `pass_Ks` is `pass_ks`", to.evaluators("pass_ks")),
    Row("eval_save_outputs", "`save_predictions=true`", to.saved_outputs),
]
SECTIONS = {
    "original": ORIGINAL,
    "etrm": ETRM,
    "trm001": TRM001,
    "absent": ABSENT,
    "evaluate": EVALUATION,
}
TRAINING = ORIGINAL + ETRM + TRM001 + ABSENT
DIALECTS = [
    Dialect("pretrain", {row.key: row for row in TRAINING}, CONFIGS),
    Dialect("evaluate", {row.key: row for row in EVALUATION}),
]


def translated(name: str, arguments: list[str], compose: Compose) -> tuple[str, list[str]]:
    """The configuration `name` and the arguments of a command in our keys, whichever command it is."""
    for dialect in DIALECTS:
        if name == dialect.base or name in dialect.configs:
            return dialect.translated(name, arguments, compose)
    return name, arguments


def keys_of(name: str) -> list[str]:
    """The keys of theirs that a command with the configuration `name` understands."""
    return [key for dialect in DIALECTS if dialect.base == name for key in dialect.rows if key[0] != "-"]


def table(section: str) -> str:
    """The rows of a section in Markdown."""
    head = "| there | here |" if section != "absent" else "| there | why not here, or what is |"
    return "\n".join([head, "|---|---|", *(f"| `{row.key}` | {row.here} |" for row in SECTIONS[section])])


if __name__ == "__main__":
    print("\n\n".join(f"{section}\n\n{table(section)}" for section in SECTIONS))
