//! The header before each packet of a TUN device with `IFF_VNET_HDR` (`include/uapi/linux/virtio_net.h`).

/// Length of the header in bytes.
pub const LENGTH: usize = 10;

/// `VIRTIO_NET_HDR_F_NEEDS_CSUM`: the checksum field contains the sum of the pseudo-header only.
const NEEDS_CHECKSUM: u8 = 1;
const GSO_NONE: u8 = 0;
const GSO_TCP4: u8 = 1;
const GSO_TCP6: u8 = 4;
const GSO_UDP: u8 = 5;
/// Flag beside the type: the first segment has CWR set.
const GSO_ECN: u8 = 0x80;

/// What the packets of an aggregate are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// TCP segments, over either version of IP.
    Tcp,
    /// UDP datagrams of one length.
    Udp,
}

/// A checksum field that is still to be completed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Checksum {
    /// Where the sum starts, in bytes from the start of the packet.
    pub start: usize,
    /// Where the field is, in bytes from `start`.
    pub offset: usize,
}

/// A parsed header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// The incomplete checksum, if any.
    pub checksum: Option<Checksum>,
    /// For an aggregate: its kind, and the payload of each packet but the last in bytes.
    pub aggregate: Option<(Kind, usize)>,
}

impl Header {
    /// Parses a header. None: the kernel used a type that Raven did not ask for.
    pub fn parse(bytes: [u8; LENGTH]) -> Option<Self> {
        let [flags, kind, _, _, size_0, size_1, start_0, start_1, offset_0, offset_1] = bytes;
        let number = |low, high| usize::from(u16::from_ne_bytes([low, high]));
        let checksum = (flags & NEEDS_CHECKSUM != 0)
            .then(|| Checksum { start: number(start_0, start_1), offset: number(offset_0, offset_1) });
        let aggregate = match kind & !GSO_ECN {
            GSO_NONE => None,
            GSO_TCP4 | GSO_TCP6 => Some((Kind::Tcp, number(size_0, size_1))),
            GSO_UDP => Some((Kind::Udp, number(size_0, size_1))),
            _ => return None,
        };
        Some(Self { checksum, aggregate })
    }

    /// The header of a packet that is complete.
    pub const COMPLETE: [u8; LENGTH] = [0; LENGTH];

    /// The header of an aggregate. `headers`: bytes before the payload.
    pub fn of_aggregate(kind: Kind, is_ipv4: bool, headers: usize, size: usize, checksum: Checksum) -> [u8; LENGTH] {
        let gso = match (kind, is_ipv4) {
            (Kind::Tcp, true) => GSO_TCP4,
            (Kind::Tcp, false) => GSO_TCP6,
            (Kind::Udp, _) => GSO_UDP,
        };
        let [[h0, h1], [s0, s1], [c0, c1], [o0, o1]] =
            [headers, size, checksum.start, checksum.offset].map(|number| (number as u16).to_ne_bytes());
        [NEEDS_CHECKSUM, gso, h0, h1, s0, s1, c0, c1, o0, o1]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn written_header_is_parsed() {
        let checksum = Checksum { start: 40, offset: 16 };
        let header = Header::of_aggregate(Kind::Tcp, false, 72, 1348, checksum);
        assert_eq!(
            Header::parse(header),
            Some(Header { checksum: Some(checksum), aggregate: Some((Kind::Tcp, 1348)) })
        );
        let complete = Header { checksum: None, aggregate: None };
        assert_eq!(Header::parse(Header::COMPLETE), Some(complete));
        // VIRTIO_NET_HDR_GSO_UDP, fragmentation of UDP, which Linux removed.
        assert_eq!(Header::parse([0, 3, 0, 0, 0, 1, 0, 0, 0, 0]), None);
    }
}
