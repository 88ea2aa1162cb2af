"""The configuration, as dataclasses: every key with its type, its default, what is allowed, and whether a resumed run may
change it (`free`). The options of a method stand in its own class."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from nostalgia.options import option


@dataclass
class ExperimentConfig:
    name: str = option("nostalgia", free=True)
    seed: int = option(
        0,
        "Seeds the weights, the data order, the class order of split=classes and the eigensolver.",
        low=0,
        high=2**32 - 1,
    )
    tasks: list[Any] | None = option(
        None, "Task list in order: data set names, or {dataset:, classes:, transform:, head:}."
    )
    num_tasks: int | None = option(
        None,
        "Without a list: how many tasks `dataset.name` makes (null: 2). With one it must equal its length.",
        low=1,
    )
    split: str = option(
        "none",
        "none: the data set as it is for every task; classes: its classes in num_tasks disjoint parts.",
        choices=("none", "classes"),
    )
    head: str = option(
        "per_task",
        "Of split=classes: a head for each task, or one that grows with the tasks' classes.",
        choices=("per_task", "shared"),
    )
    class_order: str | None = option(
        None, "Of split=classes: a JSON file with the class names or indices in the order in which tasks take them."
    )
    output_dir: str = option(
        "${oc.env:OUTPUT_DIR,runs}/${experiment.name}",
        "The run's folder is made in here, named by date and time; `latest` points at it.",
        free=True,
    )
    export: bool = option(
        True,
        "Leave the trained model in the run's folder, under export/: a copy of the backbone (two with adapters).",
        free=True,
    )
    deterministic: bool = option(False, "Deterministic kernels only (slower on GPUs).")


@dataclass
class DatasetConfig:
    name: str = option("digits", "A catalog name, a folder, or hf:user/name.")
    root: str = option("data", free=True)
    image_size: int | None = option(None, "Side in pixels the network is fed; null: the model's own.", low=2, high=4096)
    batch_size: int = option(
        128,
        "Per device and micro-batch; the global batch is this x ranks x accumulation steps.",
        low=1,
        free=True,
    )
    num_workers: int = option(
        4,
        "Loader processes per rank, for data that is decoded from files; as many threads for curvature samples.",
        low=0,
        high=256,
        free=True,
    )
    val_fraction: float = option(
        0.2,
        "Share held out, stratified by class, where a data set has no validation split of its own.",
        above=0,
        high=0.9,
    )
    augment: str = option(
        "default",
        "default (the catalog's), none, flip, crop_flip or shift; training images only.",
        choices=("default", "none", "flip", "crop_flip", "shift"),
    )
    download: bool = option(True, free=True)
    entries: dict[str, Any] = option(factory=dict, help="Catalog entries of your own: name -> {path: or hub_id:, ...}.")


@dataclass
class LoraConfig:
    r: int = option(8, low=1)
    alpha: int = option(16, low=1)
    dropout: float = option(0.05, low=0, high=0.99)
    target_modules: list[str] | None = option(
        None,
        "Layer names adapters go on; null: the attention's projections, or where none is called all layers but the first.",
    )
    merge: str = option(
        "auto",
        "task: before each later task the adapters are added into the weights and begun anew (B = 0); auto: with the methods "
        "that keep more so, see docs/methods.md.",
        choices=("auto", "never", "task"),
    )
    freeze_a: bool = option(False, "Train B alone; A stays as it was drawn.")


@dataclass
class ModelConfig:
    name: str = "vit"
    framework: str = option("hf", "hf (transformers) or torchvision.", choices=("hf", "torchvision"))
    arch: str | None = option(None, "torchvision: the architecture's name.")
    model_id: str | None = option(
        None, "hf: hub id or local folder; torchvision: a file of weights instead of the library's own."
    )
    pretrained: bool = True
    use_lora: bool = False
    lora: LoraConfig = field(default_factory=LoraConfig)
    scope: str = option(
        "auto",
        "Parameters that methods protect: backbone, lora-only, or auto (the adapters where there are some, else the "
        "backbone).",
        choices=("auto", "backbone", "lora-only"),
    )
    norm_statistics: str = option(
        "per_task",
        "Batch-norm running statistics: per_task, frozen or shared.",
        choices=("per_task", "frozen", "shared"),
    )
    config: dict[str, Any] = option(
        factory=dict,
        help="hf: settings of the network's configuration (hidden_size, ...), and attn_implementation (sdpa or eager).",
    )


@dataclass
class CurvatureConfig:
    """How the curvature of a finished task is measured, for methods and for analysis."""

    kind: str = option("ggn", "ggn: the Gauss-Newton matrix, or hessian.", choices=("ggn", "hessian"))
    solver: str = option(
        "auto",
        "Of top eigenpairs: lanczos, or for kind=ggn rows: one pass over the samples, the SVD of their gradients; auto: "
        "rows where num_samples of them fit in rows_budget_bytes.",
        choices=("auto", "lanczos", "rows"),
    )
    rows_per_sample: int = option(
        2, "Of solver=rows: random output cotangents a sample; all outputs where the network has no more.", low=1
    )
    rows_budget_bytes: int = option(
        2**32,
        "Gradients that solver=rows holds on a rank, beyond which it cuts them to their top; all that auto takes it for.",
        low=1,
    )
    last_task: bool = option(
        False,
        "Take the last task's curvature too (eigenpairs, factors): no later task uses it, analyses and appended tasks do.",
    )
    hvp: str = option(
        "exact",
        "exact (double backward), jvp (forward over reverse) or finite_difference.",
        choices=("exact", "jvp", "finite_difference"),
    )
    num_samples: int = option(512, "Training samples of a finished task that its curvature is taken over.", low=1)
    batch_size: int = option(64, "Samples per batch of a curvature product: bounds its memory.", low=1)
    tol: float = option(1e-2, "A pair is converged when |H q - lambda q| <= tol |lambda|.", above=0, high=1)
    max_products: int | None = option(None, low=1)
    max_basis: int | None = option(None, "Vectors the eigensolver holds at most; null: 2 k + 16.", low=1)
    precision: str = option(
        "float32",
        "Of the network in a curvature product; vectors are float32 at least.",
        choices=("float32", "float64", "tf32", "bf16"),
    )
    retain_graph: str = option(
        "auto",
        "Keep first-backward graphs over products: auto (while memory allows), true or false.",
        choices=("auto", "true", "false"),
        free=True,
    )
    compile: bool = option(False, "torch.compile the products of hvp=jvp.")
    checkpoint_every_n_products: int | None = option(
        None,
        "Products of an eigensolve between checkpoints; 0: none; null: as often as takes at most 2 % of its time.",
        low=0,
        free=True,
    )


@dataclass
class AnalysisConfig:
    """What is measured beside the run; training does not depend on it."""

    predict_forgetting: str = option(
        "auto",
        "Hold each finished task's loss against its second-order prediction after every later task: true, false, or auto "
        "(where the method computes eigenpairs or factors). Reads the earlier tasks' curvature samples again.",
        choices=("auto", "true", "false"),
    )
    top_k: int = option(
        32, "Eigenpairs of the prediction where the method computes none (predict_forgetting=true).", low=1
    )
    trace_samples: int = option(
        8,
        "Random vectors the trace of a task's curvature is estimated by, where no rows give it; one product each.",
        low=1,
    )
    exact_second_order: bool = option(
        False, "Add the exact quadratic term to that prediction: one product more for each pair of tasks."
    )
    captured_energy_samples: int = option(
        256,
        "Of kind=ggn: validation images on which tr(Q^T G Q) / tr G of a task's eigenvectors is measured; 0: none.",
        low=0,
    )
    spectral_density: bool = option(
        False, "Estimate the density and the trace of each finished task's whole spectrum as well."
    )
    density_runs: int = option(4, "Random vectors that density is estimated from.", low=1)
    density_steps: int = option(
        40, "Lanczos steps from each: the estimate costs (density_runs + 1) density_steps products.", low=1
    )


@dataclass
class TrainConfig:
    epochs: int = option(50, low=1, high=1_000_000)
    epochs_per_task: list[int] | None = option(None, low=1)
    optimizer: str = option(
        "adamw",
        "adafactor takes no method.project=constrained, and no FSDP2.",
        choices=("adamw", "sgd", "lion", "adafactor"),
    )
    lr: float = option(3e-4, above=0)
    head_lr: float | None = option(
        None,
        "Of the heads, which begin anew where the backbone is pretrained: 10 to 100 times lr is usual for a whole backbone. "
        "null: train.lr.",
        above=0,
    )
    weight_decay: float = option(0.05, low=0)
    betas: list[float] = option(factory=lambda: [0.9, 0.999], help="Of adamw and lion.")
    momentum: float = option(0.9, "Of sgd.", low=0, high=0.9999)
    scheduler: str = option("cosine", choices=("cosine", "constant"))
    warmup_epochs: float = option(5.0, low=0)
    head_warmup_epochs: int = option(
        0,
        "Epochs a new head is trained alone before its task; 0: none, and no forward transfer is measured.",
        low=0,
    )
    head_warmup_lr: float | None = option(None, "null: train.head_lr, or train.lr.", above=0)
    gradient_accumulation_steps: int = option(1, low=1, free=True)
    max_grad_norm: float | None = option(1.0, above=0)
    label_smoothing: float = option(0.0, low=0, high=0.99)
    precision: str = option(
        "auto",
        "64, 32, tf32, bf16, 16 (with a gradient scaler), or auto: bf16 on a GPU that has it, else 16; 32 on CPU.",
        choices=("auto", "64", "32", "tf32", "bf16", "16"),
    )
    accelerator: str = option("auto", choices=("auto", "cpu", "gpu"), free=True)
    devices: Any = option("auto", "The number of processes you expect; the launcher starts them.", free=True)
    heartbeat_seconds: float = option(
        60.0,
        "A rank that is stopped, or whose machine is gone, for longer ends the run; 0: only its timeout does.",
        low=0,
        free=True,
    )
    guard_every_n_steps: int = option(
        100, "Compare checksums of parameters over ranks this often; 0: never.", low=0, free=True
    )
    log_every_n_steps: int = option(50, low=1, free=True)
    timeout_minutes: float = option(30.0, "A rank that waits longer for the others ends the run.", above=0, free=True)
    checkpoint_every_steps: int = option(
        0, "Optimizer steps between checkpoints within an epoch; 0: none.", low=0, free=True
    )
    checkpoint_every_epochs: int = option(1, "0: none but at the end of each task.", low=0, free=True)
    keep_checkpoints: int = option(2, "The newest kept; those at the end of a task are all kept.", low=1, free=True)
    on_checkpoint_failure: str = option(
        "stop",
        "stop (exit 4; the last whole checkpoint stays) or continue with a warning.",
        choices=("stop", "continue"),
        free=True,
    )
    max_steps_per_epoch: int | None = option(None, low=1)
    max_eval_batches: int | None = option(None, low=1)
    detect_anomaly: bool = option(False, free=True)


@dataclass
class LoggerConfig:
    tensorboard: bool = True
    use_wandb: bool = False
    project: str = "nostalgia"
    entity: str | None = None
    mode: str = option("online", choices=("online", "offline", "disabled"))
    tags: list[str] = field(default_factory=list)
    group: str | None = None
    name: str | None = None
    report: bool = option(True, "Draw the figures and write report.html at the end of a run.", free=True)
    figures: list[str] = option(
        factory=list,
        help="Figures of your own too, module:function each, drawn and in the report at the end.",
        free=True,
    )
    save_dir: str | None = option(None, "Where TensorBoard and W&B write; null: the run's folder.")


@dataclass
class Config:
    experiment: ExperimentConfig = field(default_factory=ExperimentConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    method: dict[str, Any] = field(default_factory=lambda: {"name": "nostalgia"})
    """``name`` and the method's own options, which its class declares."""
    methods: dict[str, Any] = field(default_factory=dict)
    """Options by method, for runs of whichever is chosen: ``{nostalgia: {top_k: 64}, ewc: {strength: 100}}``."""
    curvature: CurvatureConfig = field(default_factory=CurvatureConfig)
    analysis: AnalysisConfig = field(default_factory=AnalysisConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
