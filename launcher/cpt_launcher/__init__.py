"""How a run comes to its ranks: rendezvous under deepspeed, torchrun, srun and plain python."""

from cpt_launcher.rendezvous import Rendezvous, find_rendezvous, is_port_free, pick_free_port

__all__ = ["Rendezvous", "find_rendezvous", "is_port_free", "pick_free_port"]
