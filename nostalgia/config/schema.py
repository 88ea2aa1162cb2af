"""The configuration, as dataclasses: every key, its type and its default. Ranges are in `checks`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class ExperimentConfig:
    name: str = "nostalgia"
    seed: int = 0
    """Seeds the weights, the data order, the class order of split=classes and the eigensolver."""
    tasks: list[Any] | None = None
    """Task list in order: data set names, or {dataset:, classes:, transform:}."""
    num_tasks: int | None = None
    """Without a list: how many tasks `dataset.name` makes (null: 2). With one it must equal its length."""
    split: str = "none"
    """none: the data set as it is for every task; classes: its classes in num_tasks disjoint parts."""
    output_dir: str = "${oc.env:OUTPUT_DIR,runs}/${experiment.name}"
    """The run's folder is made in here, named by date and time; `latest` points at it."""
    export: bool = True
    """Leave the trained model in the run's folder, under export/: a copy of the backbone (two with adapters)."""
    deterministic: bool = False
    """Deterministic kernels only (slower on GPUs)."""


@dataclass
class DatasetConfig:
    name: str = "digits"
    """A catalog name, a folder, or hf:user/name."""
    root: str = "data"
    image_size: int | None = None
    """Side in pixels the network is fed; null: the model's own."""
    batch_size: int = 128
    """Per device and micro-batch; the global batch is this x ranks x accumulation steps."""
    num_workers: int = 4
    """Loader processes per rank, for data that is decoded from files."""
    val_fraction: float = 0.2
    """Share held out, stratified by class, where a data set has no validation split of its own."""
    augment: str = "default"
    """default (the catalog's), none, flip, crop_flip or shift; training images only."""
    download: bool = True
    entries: dict[str, Any] = field(default_factory=dict)
    """Catalog entries of your own: name -> {path: or hub_id:, ...}."""


@dataclass
class LoraConfig:
    r: int = 8
    alpha: int = 16
    dropout: float = 0.05
    target_modules: list[str] | None = None
    """Layer names adapters go on; null: the attention projections of the architecture."""


@dataclass
class ModelConfig:
    name: str = "vit"
    framework: str = "hf"
    """hf (transformers) or torchvision."""
    arch: str | None = None
    """torchvision: the architecture's name."""
    model_id: str | None = None
    """hf: hub id or local folder; torchvision: a file of weights instead of the library's own."""
    pretrained: bool = True
    use_lora: bool = False
    lora: LoraConfig = field(default_factory=LoraConfig)
    norm_statistics: str = "per_task"
    """Batch-norm running statistics: per_task, frozen or shared."""
    config: dict[str, Any] = field(default_factory=dict)
    """hf without pretrained weights: the keyword arguments of its configuration (hidden_size, ...)."""


@dataclass
class MethodConfig:
    name: str = "nostalgia"
    """nostalgia, finetune (no projection: the lower bound), joint (all tasks together: the upper bound), or
    module:Class of your own."""


@dataclass
class NostalgiaConfig:
    enabled: bool = True
    top_k: int = 32
    """Eigenpairs taken of each finished task."""
    k_max: int | None = None
    """Directions the union memory holds at most; null: 4 top_k."""
    merge: str = "union"
    project: str = "constrained"
    """gradient, displacement or constrained; the gradient is projected in all three."""
    project_params: str = "auto"
    """backbone, lora-only, or auto: the adapters where there are some, else the backbone."""
    projection_start_task: int = 2
    curvature: str = "hessian"
    hvp: str = "exact"
    """exact (double backward), jvp (forward over reverse) or finite_difference."""
    num_samples: int = 2048
    """Training samples of a finished task that its curvature is taken over."""
    batch_size: int = 64
    """Samples per batch of a curvature product: bounds its memory."""
    tol: float = 1e-2
    """A pair is converged when |H q - lambda q| <= tol |lambda|."""
    max_products: int | None = None
    max_basis: int | None = None
    """Vectors the eigensolver holds at most; null: 2 top_k + 16."""
    precision: str = "float32"
    """Of the network in a curvature product: float32, float64, tf32 or bf16; vectors are float32 at least."""
    retain_graph: str = "auto"
    """Keep first-backward graphs over products: auto (while memory allows), true or false."""
    compile: bool = False
    """torch.compile the products of hvp=jvp."""
    basis_placement: str = "auto"
    """Under DDP: replicated (no collective of size P a step), sharded (1/W of the memory), auto by the budget."""
    basis_dtype: str = "float32"
    basis_memory_gb: float | None = None
    """Budget of auto, per rank; null: a tenth of the device's memory."""
    guard_every_n_steps: int = 100
    """Compare checksums of parameters and memory over ranks this often; 0: never."""
    checkpoint_every_n_products: int = 50
    """Products of an eigensolve between checkpoints; 0: none."""
    spectral_density: bool = False
    """Estimate the density and the trace of each finished task's whole spectrum as well."""
    density_runs: int = 4
    """Random vectors that density is estimated from."""
    density_steps: int = 40
    """Lanczos steps from each: the estimate costs (density_runs + 1) density_steps products."""
    predict_forgetting: str = "auto"
    """Hold each finished task's loss against its second-order prediction after every later task: true, false, or auto
    (where the method takes curvature). Reads the earlier tasks' curvature samples again, as evaluation does its own."""
    trace_samples: int = 8
    """Random vectors the trace of a finished task's curvature is estimated by; one product each."""


@dataclass
class TrainConfig:
    epochs: int = 50
    epochs_per_task: list[int] | None = None
    optimizer: str = "adamw"
    lr: float = 3e-4
    weight_decay: float = 0.05
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    momentum: float = 0.9
    """Of sgd."""
    scheduler: str = "cosine"
    warmup_epochs: float = 5.0
    head_warmup_epochs: int = 0
    """Epochs a new head is trained alone before its task; 0: none, and no forward transfer is measured."""
    head_warmup_lr: float | None = None
    """null: train.lr."""
    gradient_accumulation_steps: int = 1
    max_grad_norm: float | None = 1.0
    label_smoothing: float = 0.0
    precision: str = "auto"
    """64, 32, tf32, bf16, 16 (with a gradient scaler), or auto: 16-bit on a GPU, 32 on CPU."""
    accelerator: str = "auto"
    devices: Any = "auto"
    """The number of processes you expect; the launcher starts them."""
    heartbeat_seconds: float = 60.0
    """A rank that is stopped, or whose machine is gone, for longer ends the run; 0: only its timeout does."""
    log_every_n_steps: int = 50
    timeout_minutes: float = 30.0
    """A rank that waits longer for the others ends the run."""
    checkpoint_every_steps: int = 0
    """Optimizer steps between checkpoints within an epoch; 0: none."""
    checkpoint_every_epochs: int = 1
    """0: none but at the end of each task."""
    keep_checkpoints: int = 2
    """The newest kept; those at the end of a task are all kept."""
    on_checkpoint_failure: str = "stop"
    """stop (exit 4; the last whole checkpoint stays) or continue with a warning."""
    max_steps_per_epoch: int | None = None
    max_eval_batches: int | None = None
    detect_anomaly: bool = False


@dataclass
class LoggerConfig:
    tensorboard: bool = True
    use_wandb: bool = False
    project: str = "nostalgia"
    entity: str | None = None
    mode: str = "online"
    tags: list[str] = field(default_factory=list)
    group: str | None = None
    name: str | None = None
    save_dir: str | None = None
    """Where TensorBoard and W&B write; null: the run's folder."""


@dataclass
class Config:
    experiment: ExperimentConfig = field(default_factory=ExperimentConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    nostalgia: NostalgiaConfig = field(default_factory=NostalgiaConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
