"""The nodes that a Server wants: a file of the user's."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from profiles.serving.core2.schema import LabelValue, Quantity, Text, Toleration


class Hardware(BaseModel):
    """What a Server asks of the cluster, and of its threads.

    Attributes:
        cpu: CPUs, instead of one for each thread of each copy of the model.
        memory: instead of what was measured.
        gpus: of ``nvidia.com/gpu``.
        node_selector: labels that a node must have.
        tolerations: taints that a node may have.
        kmp_affinity: where OpenMP puts its threads, for engines that use it (``granularity=fine,compact,1,0``).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    cpu: Quantity | None = None
    memory: Quantity | None = None
    gpus: Annotated[int, Field(ge=0)] = 0
    node_selector: dict[Text, LabelValue] = {}
    tolerations: list[Toleration] = []
    kmp_affinity: Text | None = None


ANY_NODE = Hardware()
