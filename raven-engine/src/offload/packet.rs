//! The parts of an IP packet that segmentation and aggregation need.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::virtio::Kind;

const IPV4_HEADER: usize = 20;
const IPV6_HEADER: usize = 40;
const TCP_HEADER: usize = 20;
const UDP_HEADER: usize = 8;
const TCP: u8 = 6;
const UDP: u8 = 17;

/// Flags of TCP (RFC 9293 §3.1, RFC 3168 §6.1).
pub(super) const FIN: u8 = 0x01;
pub(super) const PSH: u8 = 0x08;
pub(super) const ACK: u8 = 0x10;
pub(super) const ECE: u8 = 0x40;
pub(super) const CWR: u8 = 0x80;

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
        let kind = match protocol {
            TCP => Kind::Tcp,
            UDP => Kind::Udp,
            _ => return None,
        };
        let layout = Self::after(packet, kind, is_ipv4, ip)?;
        let udp_length = || usize::from(u16::from_be_bytes([packet[ip + 4], packet[ip + 5]]));
        (kind == Kind::Tcp || udp_length() == packet.len() - ip).then_some(layout)
    }

    /// The layout of a packet whose transport header follows `ip` bytes. None: that header is impossible, or truncated.
    pub(super) fn after(packet: &[u8], kind: Kind, is_ipv4: bool, ip: usize) -> Option<Self> {
        let transport = match kind {
            Kind::Tcp => usize::from(packet.get(ip + 12)? >> 4) * 4,
            Kind::Udp => UDP_HEADER,
        };
        let headers = ip + transport;
        let is_possible = packet.len() >= headers && (kind == Kind::Udp || transport >= TCP_HEADER);
        is_possible.then_some(Self { kind, is_ipv4, ip, headers })
    }

    /// TCP's sequence number. For TCP only.
    pub(super) fn sequence(self, packet: &[u8]) -> u32 {
        let at = self.ip + 4;
        u32::from_be_bytes([packet[at], packet[at + 1], packet[at + 2], packet[at + 3]])
    }

    /// TCP's flags. For TCP only.
    pub(super) fn flags(self, packet: &[u8]) -> u8 {
        packet[self.ip + 13]
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
