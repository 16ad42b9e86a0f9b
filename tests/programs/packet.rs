//! Builds packets. Expected results are also built from scratch, not derived from the input packet.

use std::net::Ipv4Addr;

use etherparse::{IpSlice, SlicedPacket, TransportSlice};
use raven_common::{OVERLAY_MAC, OVERLAY_PORT, OVERLAY_SOURCE_MAC, OVERLAY_VNI};

use crate::topology::Net;

pub(crate) const SYN: u8 = 0x02;
pub(crate) const ACK: u8 = 0x10;
/// Source MAC address that a node's stack sets on overlay packets: that of its own `raven0`.
pub(crate) const STACK_MAC: [u8; 6] = OVERLAY_MAC;

/// MAC address of the uplink of the node under test.
pub(crate) const UPLINK_MAC: [u8; 6] = [0x02, 0, 0, 0, 0, 0x11];
/// MAC address of all other nodes on its LAN.
pub(crate) const LAN_MAC: [u8; 6] = [0x02, 0, 0, 0, 0, 0x12];

/// Address family of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Family {
    V4,
    V6,
}

impl Family {
    pub(crate) const BOTH: [Self; 2] = [Self::V4, Self::V6];

    pub(crate) fn ethertype(self) -> [u8; 2] {
        match self {
            Self::V4 => [0x08, 0x00],
            Self::V6 => [0x86, 0xdd],
        }
    }

    /// Returns the length of the IP header without options in bytes.
    pub(crate) fn header_len(self) -> usize {
        match self {
            Self::V4 => 20,
            Self::V6 => 40,
        }
    }
}

/// Content of a packet.
#[derive(Clone, Debug)]
pub(crate) enum Body {
    Udp {
        data: Vec<u8>,
    },
    Tcp {
        flags: u8,
        options: Vec<u8>,
        doff: Option<u8>,
        data: Vec<u8>,
    },
    /// Any other protocol, with its bytes.
    Other {
        protocol: u8,
        bytes: Vec<u8>,
    },
}

/// An IP packet from the pod of one prefix to the pod of another.
#[derive(Clone, Debug)]
pub(crate) struct Packet {
    pub family: Family,
    pub from: Net,
    pub to: Net,
    pub ttl: u8,
    pub class: u8,
    /// Flags and fragment offset (IPv4).
    pub fragment: u16,
    /// Options (IPv4), a multiple of four bytes.
    pub ip_options: Vec<u8>,
    pub body: Body,
}

/// Returns a UDP datagram.
pub(crate) fn udp(family: Family, from: Net, to: Net) -> Packet {
    let body = Body::Udp { data: b"payload of a pod, with odd length".to_vec() };
    Packet { family, from, to, ttl: 64, class: 0, fragment: 0x4000, ip_options: Vec::new(), body }
}

/// Returns a TCP segment.
pub(crate) fn tcp(family: Family, from: Net, to: Net, flags: u8, options: &[u8]) -> Packet {
    let body = Body::Tcp { flags, options: options.to_vec(), doff: None, data: Vec::new() };
    Packet { body, ..udp(family, from, to) }
}

/// Returns an ICMP error of a router that could not forward a packet: to the packet's sender,
/// with the packet's beginning.
pub(crate) fn icmp_error(family: Family, from: Net, to: Net) -> Packet {
    let about = &udp(family, to, from).bytes()[..family.header_len() + 8];
    // "Fragmentation needed" and "packet too big", 1,400 bytes (RFC 792, RFC 4443). The checksum is arbitrary.
    let (protocol, head) = match family {
        Family::V4 => (1, [3, 4, 0xbe, 0xef, 0, 0, 5, 120]),
        Family::V6 => (58, [2, 0, 0xbe, 0xef, 0, 0, 5, 120]),
    };
    Packet { body: Body::Other { protocol, bytes: [&head, about].concat() }, ..udp(family, from, to) }
}

/// Returns an IPv6 packet with an extension header (destination options, RFC 8200) in front of a SYN with a large MSS.
pub(crate) fn extended_syn(from: Net, to: Net) -> Packet {
    let syn = tcp(Family::V6, from, to, SYN, &[2, 4, 0xff, 0xff]).bytes()[40..].to_vec();
    // Next header TCP, 8 bytes, padded by PadN.
    let bytes = [&[6, 0, 1, 4, 0, 0, 0, 0][..], &syn].concat();
    Packet { body: Body::Other { protocol: 60, bytes }, ..udp(Family::V6, from, to) }
}

/// Returns the second fragment of a datagram (IPv6 fragment header, RFC 8200), which contains no ports.
pub(crate) fn later_fragment(from: Net, to: Net) -> Packet {
    let bytes = [&[17, 0, 0x05, 0x00, 0, 0, 0, 1][..], b"data of one pod"].concat();
    Packet { body: Body::Other { protocol: 44, bytes }, ..udp(Family::V6, from, to) }
}

impl Packet {
    pub(crate) fn ttl(self, ttl: u8) -> Self {
        Self { ttl, ..self }
    }

    pub(crate) fn class(self, class: u8) -> Self {
        Self { class, ..self }
    }

    pub(crate) fn fragment(self, fragment: u16) -> Self {
        Self { fragment, ..self }
    }

    pub(crate) fn ip_options(self, options: &[u8]) -> Self {
        Self { ip_options: options.to_vec(), ..self }
    }

    /// Sets the TCP header length (data offset), in 32-bit words.
    pub(crate) fn doff(mut self, claimed: u8) -> Self {
        match &mut self.body {
            Body::Tcp { doff, .. } => *doff = Some(claimed),
            Body::Udp { .. } | Body::Other { .. } => unreachable!("only TCP has such a field"),
        }
        self
    }

    pub(crate) fn data(mut self, new: &[u8]) -> Self {
        let (Body::Udp { data } | Body::Tcp { data, .. } | Body::Other { bytes: data, .. }) = &mut self.body;
        *data = new.to_vec();
        self
    }

    /// Pads or truncates the payload so that the whole packet has `len` bytes.
    pub(crate) fn len(self, len: usize) -> Self {
        let headers = self.clone().data(&[]).bytes().len();
        let data: Vec<u8> = (0..len - headers).map(|i| i as u8).collect();
        self.data(&data)
    }

    /// Returns the bytes from the IP header on.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let (protocol, mut body) = self.transport();
        if let Body::Other { .. } = self.body {
            return [self.header(protocol, body.len()), body].concat();
        }
        let at = if protocol == 6 { 16 } else { 6 };
        let sum = checksum(&[&self.pseudo_header(protocol, body.len()), &body]);
        // A zero checksum means "none" in UDP, so it is sent as 0xffff.
        let sum = if protocol == 17 && sum == 0 { 0xffff } else { sum };
        body[at..at + 2].copy_from_slice(&sum.to_be_bytes());
        let mut bytes = self.header(protocol, body.len());
        bytes.extend(body);
        bytes
    }

    /// Returns the frame that `raven0` receives from the stack.
    pub(crate) fn frame(&self) -> Vec<u8> {
        ethernet(OVERLAY_MAC, STACK_MAC, self.family.ethertype(), &self.bytes())
    }

    /// Returns the inner frame of the overlay.
    pub(crate) fn overlay_frame(&self) -> Vec<u8> {
        ethernet(OVERLAY_MAC, OVERLAY_SOURCE_MAC, self.family.ethertype(), &self.bytes())
    }

    fn transport(&self) -> (u8, Vec<u8>) {
        match &self.body {
            Body::Udp { data } => {
                let mut bytes = vec![0x9c, 0x40, 0x00, 0x35];
                bytes.extend((8 + data.len() as u16).to_be_bytes());
                bytes.extend([0, 0]);
                bytes.extend(data);
                (17, bytes)
            }
            Body::Tcp { flags, options, doff, data } => {
                let doff = doff.unwrap_or(5 + options.len().div_ceil(4) as u8);
                let mut bytes =
                    vec![0x9c, 0x40, 0x01, 0xbb, 1, 2, 3, 4, 5, 6, 7, 8, doff << 4, *flags, 0xff, 0xff, 0, 0, 0, 0];
                bytes.extend(options);
                bytes.extend(data);
                (6, bytes)
            }
            Body::Other { protocol, bytes } => (*protocol, bytes.clone()),
        }
    }

    fn header(&self, protocol: u8, body: usize) -> Vec<u8> {
        match self.family {
            Family::V4 => {
                let words = 5 + self.ip_options.len() / 4;
                let mut bytes = vec![0x40 | words as u8, self.class];
                bytes.extend(((words * 4 + body) as u16).to_be_bytes());
                bytes.extend([0x12, 0x34]);
                bytes.extend(self.fragment.to_be_bytes());
                bytes.extend([self.ttl, protocol, 0, 0]);
                bytes.extend(self.from.pod4());
                bytes.extend(self.to.pod4());
                bytes.extend(&self.ip_options);
                let sum = checksum(&[&bytes]);
                bytes[10..12].copy_from_slice(&sum.to_be_bytes());
                bytes
            }
            Family::V6 => {
                let mut bytes = vec![0x60 | self.class >> 4, self.class << 4 | 0x0b, 0xee, 0xf0];
                bytes.extend((body as u16).to_be_bytes());
                bytes.extend([protocol, self.ttl]);
                bytes.extend(self.from.pod6());
                bytes.extend(self.to.pod6());
                bytes
            }
        }
    }

    fn pseudo_header(&self, protocol: u8, body: usize) -> Vec<u8> {
        let mut bytes = match self.family {
            Family::V4 => [self.from.pod4(), self.to.pod4()].concat(),
            Family::V6 => [self.from.pod6(), self.to.pod6()].concat(),
        };
        bytes.extend([0, protocol]);
        bytes.extend((body as u16).to_be_bytes());
        bytes
    }
}

/// Computes the Internet checksum over consecutive parts; all but the last must have an even length.
fn checksum(parts: &[&[u8]]) -> u16 {
    let word = |pair: &[u8]| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
    let mut sum: u32 = parts.iter().flat_map(|part| part.chunks(2)).map(word).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// Returns the frame of a packet with a node's own address as source. Updates the header's checksum, but not that
/// of TCP or UDP.
pub(crate) fn sent_by(mut frame: Vec<u8>, node: [u8; 4]) -> Vec<u8> {
    if frame[14] >> 4 == 6 {
        frame[22..38].copy_from_slice(&node6(node));
        return frame;
    }
    let header = &mut frame[14..34];
    header[10..12].fill(0);
    header[12..16].copy_from_slice(&node);
    let sum = checksum(&[header]);
    header[10..12].copy_from_slice(&sum.to_be_bytes());
    frame
}

/// Returns the IPv6 address of a node. Nodes with another first byte have another prefix of 64 bits.
pub(crate) fn node6([a, b, c, d]: [u8; 4]) -> [u8; 16] {
    [0xfd, 0x10, 0, 0, 0, 0, 0, a, 0, 0, 0, 0, a, b, c, d]
}

/// Returns an Ethernet frame.
pub(crate) fn ethernet(to: [u8; 6], from: [u8; 6], ethertype: [u8; 2], payload: &[u8]) -> Vec<u8> {
    [&to[..], &from, &ethertype, payload].concat()
}

/// An overlay frame on the pool's LAN.
#[derive(Clone, Debug)]
pub(crate) struct Overlay {
    /// Destination and source MAC address.
    pub macs: [[u8; 6]; 2],
    pub from: [u8; 4],
    pub to: [u8; 4],
    pub class: u8,
    pub fragment: u16,
    pub ip_options: Vec<u8>,
    pub protocol: u8,
    pub ports: [u16; 2],
    pub flags: u8,
    pub vni: u32,
    /// Inner Ethernet frame.
    pub inner: Vec<u8>,
}

/// Returns a valid overlay frame with `inner` from one node to another.
pub(crate) fn overlay(from: [u8; 4], to: [u8; 4], inner: Vec<u8>) -> Overlay {
    Overlay {
        macs: [UPLINK_MAC, LAN_MAC],
        from,
        to,
        class: 0,
        fragment: 0x4000,
        ip_options: Vec::new(),
        protocol: 17,
        ports: [50_000, OVERLAY_PORT],
        flags: 0x08,
        vni: OVERLAY_VNI,
        inner,
    }
}

impl Overlay {
    /// Swaps the MAC addresses for a frame that leaves the node under test.
    pub(crate) fn leaving(self) -> Self {
        Self { macs: [LAN_MAC, UPLINK_MAC], ..self }
    }

    pub(crate) fn frame(&self) -> Vec<u8> {
        let words = 5 + self.ip_options.len() / 4;
        let udp_len = 8 + 8 + self.inner.len();
        let mut ip = vec![0x40 | words as u8, self.class];
        ip.extend(((words * 4 + udp_len) as u16).to_be_bytes());
        ip.extend([0, 0]);
        ip.extend(self.fragment.to_be_bytes());
        ip.extend([64, self.protocol, 0, 0]);
        ip.extend(self.from);
        ip.extend(self.to);
        ip.extend(&self.ip_options);
        let sum = checksum(&[&ip]);
        ip[10..12].copy_from_slice(&sum.to_be_bytes());
        ip.extend(self.ports[0].to_be_bytes());
        ip.extend(self.ports[1].to_be_bytes());
        ip.extend((udp_len as u16).to_be_bytes());
        ip.extend([0, 0, self.flags, 0, 0, 0]);
        ip.extend((self.vni << 8).to_be_bytes());
        ip.extend(&self.inner);
        ethernet(self.macs[0], self.macs[1], [0x08, 0x00], &ip)
    }
}

/// Fails unless lengths and checksums of an IP packet are valid according to etherparse.
pub(crate) fn assert_sound(packet: &[u8], what: &str) {
    let sliced = SlicedPacket::from_ip(packet).unwrap_or_else(|e| panic!("{what}: {e}"));
    let ip = match sliced.net {
        Some(etherparse::NetSlice::Ipv4(ip)) => {
            let header = ip.header();
            assert_eq!(
                header.header_checksum(),
                header.to_header().calc_header_checksum(),
                "{what}: IPv4 header checksum"
            );
            IpSlice::Ipv4(ip)
        }
        Some(etherparse::NetSlice::Ipv6(ip)) => IpSlice::Ipv6(ip),
        other => panic!("{what}: not an IP packet: {other:?}"),
    };
    let ([from4, to4], v4) = match &ip {
        IpSlice::Ipv4(ip) => ([ip.header().source(), ip.header().destination()], true),
        IpSlice::Ipv6(_) => ([Ipv4Addr::UNSPECIFIED.octets(); 2], false),
    };
    let [from6, to6] = match &ip {
        IpSlice::Ipv6(ip) => [ip.header().source(), ip.header().destination()],
        IpSlice::Ipv4(_) => [[0; 16]; 2],
    };
    match sliced.transport {
        Some(TransportSlice::Tcp(tcp)) => {
            let sum = if v4 { tcp.calc_checksum_ipv4(from4, to4) } else { tcp.calc_checksum_ipv6(from6, to6) };
            assert_eq!(tcp.checksum(), sum.expect("compute the checksum"), "{what}: TCP checksum");
        }
        Some(TransportSlice::Udp(udp)) => {
            let header = udp.to_header();
            let sum = match v4 {
                true => header.calc_checksum_ipv4_raw(from4, to4, udp.payload()),
                false => header.calc_checksum_ipv6_raw(from6, to6, udp.payload()),
            };
            assert_eq!(udp.checksum(), sum.expect("compute the checksum"), "{what}: UDP checksum");
        }
        other => panic!("{what}: neither TCP nor UDP: {other:?}"),
    }
}

/// Fails unless `frame` is the overlay frame of `inner` as created by the VXLAN device of the node under test. Source
/// port and identification are arbitrary; all other bytes must match.
pub(crate) fn assert_from_vxlan_device(frame: &[u8], what: &str, from: [u8; 4], to: [u8; 4], inner: &Packet) {
    let mut expected = Overlay { class: inner.class, ..overlay(from, to, inner.overlay_frame()).leaving() }.frame();
    assert!(frame.len() >= 36, "{what}: {} bytes", frame.len());
    let sum = etherparse::Ipv4HeaderSlice::from_slice(&frame[14..]).expect("parse the outer header").to_header();
    assert_eq!(sum.header_checksum, sum.calc_header_checksum(), "{what}: outer header checksum");
    // Identification, header checksum and source port.
    for own in [18..20, 24..26, 34..36] {
        expected[own.clone()].copy_from_slice(&frame[own]);
    }
    let difference = crate::case::hex_difference("frame", &expected, frame);
    assert!(difference.is_empty(), "{what}:\n{difference}");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::topology::{EDGES, MINE};

    #[test]
    fn packets_are_valid_according_to_etherparse() {
        for family in Family::BOTH {
            assert_sound(&udp(family, MINE, EDGES).bytes(), "UDP");
            assert_sound(&udp(family, MINE, EDGES).ttl(1).class(0xb9).len(1400).bytes(), "a long one");
            let syn = tcp(family, MINE, EDGES, SYN, &[2, 4, 5, 180]);
            assert_sound(&syn.bytes(), "TCP");
            assert_sound(&syn.data(b"odd").bytes(), "TCP with data");
        }
        let with_options = tcp(Family::V4, MINE, EDGES, SYN, &[2, 4, 5, 180]).ip_options(&[1, 1, 1, 0]);
        assert_sound(&with_options.bytes(), "IP options");
    }
}
