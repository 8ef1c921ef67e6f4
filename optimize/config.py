"""The campaign file: what the user writes, checked at the edge and turned into records."""

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from optimize.cluster_config import Backend, ClusterConfig, LocalConfig
from optimize.engines.port import Resources
from profiles.measure.cost import HardwareConfig, find_hardware
from registry.errors import InputError
from registry.records import ServingProfile

REGISTERED = re.compile(r"models:/(?P<name>[^/:@]+)(@(?P<alias>[\w.-]+)|/(?P<version>\d+))")
_NAME = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"
Name = Annotated[str, Field(pattern=_NAME, max_length=50)]
# As Ray and Kubernetes have them.
_LABEL_VALUE = r"^[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$"
_LABEL = r"^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$"


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SourceConfig(_Model):
    """One model: exactly one of ``onnx``, ``torch`` and ``huggingface`` names it.

    Attributes:
        name: its name in the campaign.
        onnx: path of an ONNX file.
        torch: ``package.module:factory`` of a function that returns a torch module.
        huggingface: folder of a Hugging Face model.
        task: Hugging Face: optimum's name of the task.
        pooling: Hugging Face: what turns token states into one embedding, or None to leave them.
        normalize: Hugging Face: whether the embedding is scaled to length 1.
        allow_pickle: Hugging Face: whether weights in pickles (``.bin``, ``.pt``) may be read, by torch's weights-only
            reader; without it only safetensors are.
        opset: the ONNX opset to export to, or None for the exporter's own.
        depends_on: torch: files that the factory reads (weights, say); when one changes, the model is exported anew.
    """

    name: Name = "model"
    onnx: str | None = None
    torch: str | None = Field(default=None, pattern=r"^[\w.]+:\w+$")
    huggingface: str | None = None
    task: str = "feature-extraction"
    pooling: Literal["mean", "cls"] | None = None
    normalize: bool = False
    allow_pickle: bool = False
    opset: int | None = Field(default=None, ge=9, le=25)
    depends_on: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        given = [kind for kind in ("onnx", "torch", "huggingface") if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(f"a source names exactly one of onnx, torch and huggingface, not {given or 'none'}")
        return self

    @property
    def kind(self) -> Literal["onnx", "torch", "huggingface"]:
        """Which of the three it is."""
        if self.onnx is not None:
            return "onnx"
        return "torch" if self.torch is not None else "huggingface"

    @property
    def location(self) -> str:
        """The path or the factory, as given."""
        return self.onnx or self.torch or self.huggingface or ""


class SamplesConfig(_Model):
    """Where the samples are: ``.npz`` files with one array per input, and ``labels``.

    Attributes:
        evaluation: held-out samples that judge the variants, and load the servers.
        calibration: samples that static quantization takes its ranges from, or None: it is then not applicable.
    """

    evaluation: str
    calibration: str | None = None


class StageConfig(BaseModel):
    """A stage of the user's own recipe: its name, and its parameters beside it."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str


class RecipeConfig(_Model):
    """A recipe of the user's own.

    Attributes:
        name: the variant's name.
        stages: in order.
        engine: what runs the outcome; None leaves it to what the stages make.
    """

    name: Name
    stages: tuple[StageConfig, ...]
    engine: Literal["onnxruntime", "openvino"] | None = None

    @field_validator("stages", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        return [{"name": one} if isinstance(one, str) else one for one in value] if isinstance(value, list) else value


class ServingConfig(_Model):
    """A serving profile; see `registry.records.ServingProfile`.

    Attributes:
        backend: None for ours in each server (``burnish`` in MLServer, ``python`` in Triton); Triton's own are served
            by a Core 2 alone.
    """

    server: Literal["mlserver", "triton"]
    backend: Backend | None = None
    protocol: Literal["grpc", "rest"] = "grpc"
    max_batch_size: int = Field(default=1, ge=1, le=1024)
    max_batch_delay_ms: float = Field(default=0.0, ge=0, le=10_000)
    instances: int = Field(default=1, ge=1, le=64)
    parallel_workers: int = Field(default=0, ge=0, le=64)
    threads: int = Field(default=1, ge=1, le=256)

    @model_validator(mode="after")
    def _batching_waits(self) -> Self:
        if self.max_batch_size > 1 and self.server == "mlserver" and self.max_batch_delay_ms == 0:
            raise ValueError(
                "MLServer batches only with a delay above 0: set max_batch_delay_ms, or max_batch_size to 1"
            )
        if self.backend is not None and (self.backend == "burnish") != (self.server == "mlserver"):
            known = "burnish" if self.server == "mlserver" else "python, onnxruntime and openvino"
            raise ValueError(f"{self.server} has the backend {known}, not {self.backend}")
        if self.server == "mlserver" and self.instances != 1:
            raise ValueError("instances are Triton's; MLServer takes parallel_workers")
        if self.server == "triton" and self.parallel_workers:
            raise ValueError("parallel_workers are MLServer's; Triton takes instances")
        return self

    def profile(self) -> ServingProfile:
        """The record of it, with its backend."""
        own: Backend = "burnish" if self.server == "mlserver" else "python"
        return ServingProfile(backend=self.backend or own, **self.model_dump(exclude={"backend"}))


class PolicyConfig(_Model):
    """The user's constraints and objective, in the policy's words.

    Attributes:
        constraints: one line each.
        objective: one line, or several in falling order of weight.
        signature: whether a variant whose inputs or outputs differ from the baseline's may win.
    """

    constraints: tuple[str, ...] = ()
    objective: str | tuple[str, ...] = "maximize max_throughput_rps"
    signature: Literal["same", "may_change"] = "same"

    @property
    def objectives(self) -> tuple[str, ...]:
        """The objectives, in order."""
        return (self.objective,) if isinstance(self.objective, str) else self.objective


class ChampionConfig(_Model):
    """The candidate that serves now, in the working folder of the campaign that chose it.

    Attributes:
        work: that folder.
        candidate: name or id of the candidate; None for the one that the campaign selected.
    """

    work: str
    candidate: str | None = None


class RegistryConfig(_Model):
    """Where results go.

    Attributes:
        model_name: the registered model's name; None takes the campaign's.
        tracking_uri: MLflow's tracking store; None takes ``MLFLOW_TRACKING_URI``, else SQLite in the working folder.
            One with a password belongs into that variable, not into a file.
    """

    model_name: str | None = Field(default=None, pattern=r"^[^/:]+$")
    tracking_uri: str | None = None

    @field_validator("tracking_uri")
    @classmethod
    def _no_password(cls, value: str | None) -> str | None:
        if value is not None and urlsplit(value).password:
            # Of this kind a message does not show the value.
            raise PydanticCustomError(
                "secret", "a password does not belong into a file: set MLFLOW_TRACKING_URI, or MLflow's own variables"
            )
        return value


class AccuracySearchConfig(_Model):
    """How far a quantized variant that misses the limit on ``accuracy_drop`` is searched for nodes to leave in float32.

    Attributes:
        trials: most variants to make and judge.
        minutes: longest for ranking and trials together; what has begun by then still ends.
    """

    trials: int = Field(default=12, ge=1, le=500)
    minutes: float = Field(default=10.0, gt=0, le=1440)


class ServingSearchConfig(_Model):
    """How far serving profiles are searched for, beside those that ``serving`` names.

    Lanes times threads are never more than the CPUs that servers have, and MLServer batches only with a delay: what
    breaks that is left out.

    Attributes:
        points: most profiles to serve and measure for a variant; two variants are searched at most.
        minutes: longest for a variant; what has begun by then still ends.
        servers: to choose from; empty for those of ``serving``.
        protocols: to choose from.
        batch_sizes: largest batches; 1 is without batching.
        delays_ms: longest waits for company.
        lanes: MLServer's parallel_workers and Triton's instances, where 0 is MLServer's alone; empty for 0, 1, 2, 4 ...
            up to the CPUs.
        threads: of each session; empty for 1, 2, 4 ... up to the CPUs.
    """

    points: int = Field(default=20, ge=1, le=1000)
    minutes: float = Field(default=10.0, gt=0, le=1440)
    servers: tuple[Literal["mlserver", "triton"], ...] = ()
    protocols: tuple[Literal["grpc", "rest"], ...] = Field(default=("grpc", "rest"), min_length=1)
    batch_sizes: tuple[Annotated[int, Field(ge=1, le=1024)], ...] = Field(default=(1, 2, 4, 8, 16, 32), min_length=1)
    delays_ms: tuple[Annotated[float, Field(ge=0, le=10_000)], ...] = Field(
        default=(0.0, 0.5, 1.0, 2.0, 5.0), min_length=1
    )
    lanes: tuple[Annotated[int, Field(ge=0, le=64)], ...] = ()
    threads: tuple[Annotated[int, Field(ge=1, le=256)], ...] = ()


class SearchConfig(_Model):
    """What is searched for beyond the variants that are named; nothing without a section of its own.

    Attributes:
        accuracy: nodes of quantized variants to leave in float32.
        serving: serving profiles.
    """

    accuracy: AccuracySearchConfig | None = None
    serving: ServingSearchConfig | None = None


class LimitsConfig(_Model):
    """What a campaign may take.

    Attributes:
        timeout_s: of one child process that makes or judges a variant.
        memory_mb: of the same.
        load_timeout_s: until a candidate is ready to be asked, the start of its server included.
        deployed: ``all`` candidates through all rounds, or ``one`` at a time, where memory does not hold them all; it
            is then deployed anew for each of its turns, which takes longer.
        minutes: for how long a run of the campaign begins work; None for no end. See `optimize.budget`.
    """

    timeout_s: float = Field(default=900.0, gt=0)
    memory_mb: int = Field(default=12_000, gt=0)
    load_timeout_s: float = Field(default=60.0, gt=0)
    deployed: Literal["all", "one"] = "all"
    minutes: float | None = Field(default=None, gt=0, allow_inf_nan=False)


class ResourcesConfig(_Model):
    """What judging, serving and measuring need of a machine; a node of a cluster is chosen by it.

    Attributes:
        cores: how many, all of which they have alone; None for all of the machine.
        memory_mb: how much of its memory is kept for them, in MB of 10^6 bytes; None for any.
        gpus: how many.
        accelerator: the type of the GPUs, by Ray's name (``L4``), or None for any.
        labels: labels that a node must have, with their values.
    """

    cores: int | None = Field(default=None, ge=1)
    memory_mb: int | None = Field(default=None, gt=0)
    gpus: int = Field(default=0, ge=0)
    accelerator: str | None = Field(default=None, pattern=r"^[\w.-]+$")
    labels: Mapping[Annotated[str, Field(pattern=_LABEL)], Annotated[str, Field(pattern=_LABEL_VALUE)]] = {}

    @model_validator(mode="after")
    def _of_gpus(self) -> Self:
        if self.accelerator is not None and not self.gpus:
            raise ValueError(f"accelerator: {self.accelerator} is a type of GPU; say how many, gpus: 1 or more")
        return self

    def needed(self) -> Resources:
        """What the measuring asks of an engine."""
        return Resources(**self.model_dump(), alone=True)


_BOTH_SERVERS = (
    ServingConfig(server="mlserver", max_batch_size=8, max_batch_delay_ms=2.0),
    ServingConfig(server="triton", max_batch_size=8, max_batch_delay_ms=2.0),
)


class CampaignConfig(_Model):
    """A campaign: from sources to a verdict.

    Attributes:
        name: its name.
        sources: the models; the first is the baseline's.
        samples: held-out and calibration samples.
        metric: the task metric: a built-in's name, or ``package.module:function``.
        variants: names of recipes and of sets (``fast``, ``balanced``, ``thorough``), and recipes written here; a
            single name may stand alone.
        recipes: a file with recipes and sets of the user's own, in the form of ``optimize/recipes.yaml``; or None.
        serving: serving profiles; the first is the baseline's.
        cluster: where candidates are served; this machine where nothing is said.
        hardware: the machine that costs are counted for, with its price; or the name of one of
            ``profiles/library/hardware.yaml``, which have none; or None.
        level: level of proof: ``quick``, ``standard``, ``proof``, or one of the file that ``levels`` names.
        levels: a file with levels of the user's own, in the form of ``profiles/library/levels.yaml``; or None.
        policy: constraints and objective.
        champion: what serves now, to be measured again beside the others: the working folder of the campaign that
            chose it, or ``models:/NAME@champion`` of the tracking store; None where nothing does.
        target_instruction_sets: those of the machines that are to serve the winner, as ``burnish doctor`` names them;
            None where they are this machine's. Variants are judged for them: one whose u8 times s8 sums would overflow
            there is refused.
        predict: whether recipes that are hopeless for a model are left out, with the reason, before anything is made.
        search: what is searched for beyond the variants that are named.
        registry: where results go.
        limits: of child processes, of what is deployed at the same time, and of a run's time.
        resources: what judging, serving and measuring need of the machine that does it.
        seed: of calibration, order of rounds, arrivals and resampling.
    """

    name: Name
    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    samples: SamplesConfig
    metric: str = "accuracy"
    variants: tuple[str | RecipeConfig, ...] = ("balanced",)
    recipes: str | None = None
    serving: tuple[ServingConfig, ...] = Field(default=_BOTH_SERVERS, min_length=1)
    cluster: ClusterConfig = LocalConfig()
    hardware: str | HardwareConfig | None = None
    level: str = "standard"
    levels: str | None = None
    policy: PolicyConfig = PolicyConfig()
    champion: str | ChampionConfig | None = None
    target_instruction_sets: tuple[str, ...] | None = None
    predict: bool = True
    search: SearchConfig = SearchConfig()
    registry: RegistryConfig = RegistryConfig()
    limits: LimitsConfig = LimitsConfig()
    resources: ResourcesConfig = ResourcesConfig()
    seed: int = Field(default=0, ge=0, lt=2**31)

    @field_validator("variants", mode="before")
    @classmethod
    def _one_name(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("sources", "serving")
    @classmethod
    def _distinct(cls, value: tuple[Any, ...]) -> tuple[Any, ...]:
        names = [item.name if isinstance(item, SourceConfig) else item.profile().key for item in value]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"{', '.join(twice)} is given twice; each must differ")
        return value

    @model_validator(mode="after")
    def _served_there(self) -> Self:
        for number, entry in enumerate(self.serving):
            why = self.cluster.why_not(entry.profile())
            if why is not None:
                raise ValueError(f"serving[{number}] cannot be served: {why}")
        if self.serving[0].backend == "openvino":
            raise ValueError(
                "the first of serving is the baseline's, whose float32 model runs in onnxruntime and not in openvino: "
                "put another first"
            )
        return self

    @field_validator("champion")
    @classmethod
    def _names_a_version(cls, value: str | ChampionConfig | None) -> str | ChampionConfig | None:
        if isinstance(value, str) and value.startswith("models:") and not REGISTERED.fullmatch(value):
            raise ValueError("a registered model is named models:/NAME@ALIAS or models:/NAME/VERSION")
        return value

    @field_validator("hardware")
    @classmethod
    def _known_hardware(cls, value: str | HardwareConfig | None) -> str | HardwareConfig | None:
        if isinstance(value, str):
            try:
                find_hardware(value)
            except InputError as error:
                raise ValueError(f"{error.message}. {error.hint}") from error
        return value

    @field_validator("target_instruction_sets")
    @classmethod
    def _known_sets(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        from profiles.measure.host import INSTRUCTION_SETS

        unknown = sorted(set(value or ()) - set(INSTRUCTION_SETS))
        if unknown:
            near = difflib.get_close_matches(unknown[0], INSTRUCTION_SETS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(INSTRUCTION_SETS)}"
            raise ValueError(f"there is no instruction set {unknown[0]!r}; {hint}")
        return value


def load_campaign(path: Path) -> CampaignConfig:
    """The campaign file at ``path``.

    Raises:
        DocumentError: it is missing, malformed or does not fit; the message names file, line and key.
    """
    from registry.documents import load_document

    return load_document(path, CampaignConfig)
