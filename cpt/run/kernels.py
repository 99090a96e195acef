"""Which twin of each kernel serves a run: the same on all its ranks, or the run does not begin."""

from __future__ import annotations

import json

from cpt.config import Fault
from cpt.parallel.mesh import Mesh
from cpt.parallel.together import alike, together
from cpt_kernels import switch


def kernels_for(settings: switch.Settings, mesh: Mesh) -> switch.Kernels:
    """What serves on this rank's device, and on all others; every rank must come here.

    Raises Fault if a twin that is asked for cannot serve on a device, and if a twin failed its check on some devices
    only: what tensor ranks hold alike would drift apart.
    """
    with together(mesh):
        if faults := settings.faults_on(mesh.device):
            raise Fault(f"kernels.{line}" for line in faults)
    kernels = switch.choose(settings, mesh.device)
    with alike(mesh):
        first, *others = [json.loads(text) for text in mesh.texts(json.dumps(kernels.told))]
        lines = [
            f"kernels.{operation}: rank 0 would be served by {twin}, rank {rank} by {told[operation]}; "
            f"name one for all, such as kernels.{operation} = plain"
            for rank, told in enumerate(others, start=1)
            for operation, twin in first.items()
            # The first word is the twin; what follows may tell of errors, which differ.
            if twin.split()[0] != told[operation].split()[0]
        ]
        if lines:
            raise Fault(lines)
    return kernels
