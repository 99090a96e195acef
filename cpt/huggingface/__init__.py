"""In from Hugging Face folders and out to them, with a certificate that the exported model is the trained one."""

from cpt.huggingface.certificate import certify
from cpt.huggingface.export import DTYPES
from cpt.huggingface.load import read_folder
from cpt.huggingface.publish import publish
from cpt.huggingface.verify import examine, verify

__all__ = ["DTYPES", "certify", "examine", "publish", "read_folder", "verify"]
