"""How a run comes to its ranks: rendezvous under deepspeed, torchrun, srun and plain python, and who started it."""

from cpt_launcher.launchers import Launchers, find_launchers
from cpt_launcher.rendezvous import Rendezvous, find_rendezvous, is_port_free, pick_free_port

__all__ = ["Launchers", "Rendezvous", "find_launchers", "find_rendezvous", "is_port_free", "pick_free_port"]
