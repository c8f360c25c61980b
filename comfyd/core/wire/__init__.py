"""What a ComfyUI server says, decoded: hostile until it has passed through here.

Pure functions from bytes or text to typed values. ``messages`` is the WebSocket's half, the other
modules are HTTP's. Whatever the input, nothing but ``ServerProtocol`` is raised (and the message
decoder raises nothing at all). How much input there can be is the caller's limit to set.
"""

from comfyd.core.wire.answers import (
    QueueItem,
    QueueSnapshot,
    SubmitReply,
    decode_listing,
    decode_queue,
    decode_remaining,
    decode_submit,
    decode_upload,
)
from comfyd.core.wire.history import decode_history
from comfyd.core.wire.messages import (
    MESSAGE_TYPES,
    Alive,
    Ended,
    Ending,
    Ignored,
    Invalid,
    Message,
    Status,
    decode_message,
    label_of,
)
from comfyd.core.wire.rejection import decode_rejection
from comfyd.core.wire.stats import (
    MIN_VERSION,
    Device,
    SystemStats,
    VersionVerdict,
    decode_stats,
    parse_version,
    version_verdict,
)

__all__ = [
    "MESSAGE_TYPES",
    "MIN_VERSION",
    "Alive",
    "Device",
    "Ended",
    "Ending",
    "Ignored",
    "Invalid",
    "Message",
    "QueueItem",
    "QueueSnapshot",
    "Status",
    "SubmitReply",
    "SystemStats",
    "VersionVerdict",
    "decode_history",
    "decode_listing",
    "decode_message",
    "decode_queue",
    "decode_rejection",
    "decode_remaining",
    "decode_stats",
    "decode_submit",
    "decode_upload",
    "label_of",
    "parse_version",
    "version_verdict",
]
