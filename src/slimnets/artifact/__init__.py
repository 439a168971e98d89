"""One small file for a compressed network."""

from slimnets.artifact.checkpoint import convert_checkpoint as convert_checkpoint
from slimnets.artifact.codec import Entry as Entry
from slimnets.artifact.container import inspect as inspect
from slimnets.artifact.container import stored_bytes as stored_bytes
from slimnets.artifact.file import load as load
from slimnets.artifact.file import save as save
from slimnets.artifact.index import FileInfo as FileInfo
from slimnets.artifact.streams import ArtifactError as ArtifactError
