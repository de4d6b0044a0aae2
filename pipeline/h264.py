"""What H.264 packets say before they are decoded (ITU-T H.264, 7.3.1 and 7.4.1)."""

from collections.abc import Iterator

SLICE, INSTANT, SEI, DELIMITER, FILLER = 1, 5, 6, 9, 12  # nal_unit_type
ANNEX_B = (b"\0\0\1", b"\0\0\0\1")  # start codes instead of lengths


def length_size(extradata: bytes | None) -> int:
    """Bytes of the length before each NAL unit of a stream's packets (ISO/IEC 14496-15, 5.3.3.1); 0 where they have none."""
    if not extradata or len(extradata) < 7 or extradata.startswith(ANNEX_B):
        return 0
    return (extradata[4] & 3) + 1


def is_droppable(packet: memoryview, length_size: int) -> bool:
    """Whether no other frame refers to this one (nal_ref_idc 0 in all its slices) and nothing else is in the packet.

    All other frames decode to the same pixels without it: neither their references, nor frame_num, nor the picture order count of a
    later frame depend on a non-reference picture.
    """
    has_slice = False
    for header in _headers(packet, length_size):
        kind, is_reference = header & 31, header >> 5 & 3
        if kind == SLICE and not is_reference:
            has_slice = True
        elif kind not in (SEI, DELIMITER, FILLER):
            return False
    return has_slice


def is_instant(packet: memoryview, length_size: int) -> bool:
    """Whether decoding can begin here, and nothing later refers to what came before (an IDR picture)."""
    return any(header & 31 == INSTANT for header in _headers(packet, length_size))


def _headers(packet: memoryview, length_size: int) -> Iterator[int]:
    """The first byte of each NAL unit."""
    place = 0
    while place + length_size < len(packet):
        yield packet[place + length_size]
        place += length_size + int.from_bytes(packet[place : place + length_size], "big")
