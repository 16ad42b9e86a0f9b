//! The parts of an IP packet that segmentation and aggregation need.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::virtio::Kind;

const IPV4_HEADER: usize = 20;
const IPV6_HEADER: usize = 40;
const TCP: u8 = 6;
const UDP: u8 = 17;

/// Source and destination of a packet. None if it is neither IPv4 nor IPv6, or truncated.
pub(crate) fn addresses(packet: &[u8]) -> Option<(IpAddr, IpAddr)> {
    match packet.first()? >> 4 {
        4 => {
            let bytes: &[u8; IPV4_HEADER] = packet.first_chunk()?;
            let address = |at: usize| Ipv4Addr::from([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
            Some((address(12).into(), address(16).into()))
        }
        6 => {
            let source: [u8; 16] = packet.get(8..24)?.try_into().ok()?;
            let destination: [u8; 16] = packet.get(24..40)?.try_into().ok()?;
            Some((Ipv6Addr::from(source).into(), Ipv6Addr::from(destination).into()))
        }
        _ => None,
    }
}

/// Length of a packet by its header, in bytes: WireGuard pads. None if the packet is shorter than it states.
pub(crate) fn stated_length(packet: &[u8]) -> Option<usize> {
    let field = |at: usize| Some(usize::from(u16::from_be_bytes([*packet.get(at)?, *packet.get(at + 1)?])));
    let (length, least) = match packet.first()? >> 4 {
        4 => (field(2)?, IPV4_HEADER),
        6 => (field(4)? + IPV6_HEADER, IPV6_HEADER),
        _ => return None,
    };
    (least..=packet.len()).contains(&length).then_some(length)
}

/// Where the headers of a TCP or UDP packet are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    pub(crate) kind: Kind,
    pub(crate) is_ipv4: bool,
    /// Bytes of the IP header.
    pub(crate) ip: usize,
    /// Bytes of both headers.
    pub(crate) headers: usize,
}

impl Layout {
    /// Finds the headers. None: the packet is something else, a fragment, has IPv4 options or IPv6 extension headers, or
    /// its lengths contradict each other.
    pub(crate) fn of(packet: &[u8]) -> Option<Self> {
        let (is_ipv4, ip, protocol) = match *packet.first()? {
            0x45 => {
                let header: &[u8; IPV4_HEADER] = packet.first_chunk()?;
                // Any bit but "don't fragment" makes it a fragment (RFC 791).
                let is_fragment = header[6] & !0x40 != 0 || header[7] != 0;
                (true, IPV4_HEADER, (!is_fragment).then_some(header[9])?)
            }
            first if first >> 4 == 6 => (false, IPV6_HEADER, *packet.get(6)?),
            _ => return None,
        };
        if stated_length(packet)? != packet.len() {
            return None;
        }
        let (kind, transport) = match protocol {
            TCP => (Kind::Tcp, usize::from(packet.get(ip + 12)? >> 4) * 4),
            UDP => (Kind::Udp, 8),
            _ => return None,
        };
        let headers = ip + transport;
        let is_possible = packet.len() >= headers && (kind == Kind::Udp || transport >= 20);
        let layout = is_possible.then_some(Self { kind, is_ipv4, ip, headers })?;
        let udp_length = || usize::from(u16::from_be_bytes([packet[ip + 4], packet[ip + 5]]));
        (kind == Kind::Tcp || udp_length() == packet.len() - ip).then_some(layout)
    }

    /// Number of the transport protocol.
    pub(crate) fn protocol(self) -> u8 {
        match self.kind {
            Kind::Tcp => TCP,
            Kind::Udp => UDP,
        }
    }

    /// Where the transport's checksum is, in bytes from the start of its header.
    pub(crate) fn checksum_offset(self) -> usize {
        match self.kind {
            Kind::Tcp => 16,
            Kind::Udp => 6,
        }
    }
}
