//! Packet headers in wire format: fields are bytes in network order with alignment 1; accessors return host order.
//! The module also compiles for the host, where unit tests cover the parsing code of the eBPF programs.

use crate::{OVERLAY_MAC, OVERLAY_OVERHEAD, OVERLAY_PORT, OVERLAY_SOURCE_MAC, OVERLAY_VNI, checksum};

/// Ethernet type of IPv4, in host order.
pub const ETH_P_IP: u16 = 0x0800;
/// Ethernet type of IPv6, in host order.
pub const ETH_P_IPV6: u16 = 0x86dd;
/// IP protocol number of TCP.
pub const IPPROTO_TCP: u8 = 6;
/// IP protocol number of UDP.
pub const IPPROTO_UDP: u8 = 17;
/// Length of an Ethernet header in bytes.
pub const ETH_LEN: usize = 14;

/// Common interface of the IPv4 and IPv6 headers, so that each datapath program is written once for both families.
pub trait Ip: Copy {
    /// Address in network order.
    type Addr: Copy + PartialEq;
    /// Ethernet type in host order.
    const ETHERTYPE: u16;
    /// Length of the fixed header in bytes.
    const LEN: usize;

    /// Reports whether version and length fields are consistent. Does not compare them with the packet's real length.
    fn is_sound(&self) -> bool;
    /// Source address, in network order.
    fn source(&self) -> Self::Addr;
    /// Destination address, in network order.
    fn destination(&self) -> Self::Addr;
    /// Reports whether the destination is a multicast address (RFC 5771, RFC 4291 §2.7).
    fn is_multicast(&self) -> bool;
    /// TTL (IPv4) or hop limit (IPv6).
    fn ttl(&self) -> u8;
    /// DSCP and ECN as one byte.
    fn traffic_class(&self) -> u8;
    /// Length of the whole packet in bytes, headers included.
    fn total_len(&self) -> u32;
    /// Offset of the TCP header from the start of this header in bytes. `None` unless TCP follows directly and the
    /// packet is no fragment.
    fn tcp_offset(&self) -> Option<usize>;
    /// Returns the header bytes to write to decrement TTL or hop limit.
    fn hop(&self) -> Hop;
}

/// A write to the IP header that decrements TTL or hop limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hop {
    /// Offset of the write in the IP header in bytes.
    pub offset: usize,
    /// IPv4: TTL, protocol and checksum. IPv6: the hop limit in the first byte; the rest is unused.
    pub bytes: [u8; 4],
}

/// IPv4 header without options (RFC 791).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ipv4 {
    /// Version (4) and header length in 32-bit words.
    pub version_ihl: u8,
    /// DSCP and ECN.
    pub tos: u8,
    /// Length of the packet in bytes, header included.
    pub total_len: [u8; 2],
    /// Identification of the packet for reassembly.
    pub id: [u8; 2],
    /// Flags and fragment offset.
    pub fragment: [u8; 2],
    /// Time to live in hops.
    pub ttl: u8,
    /// Protocol of the payload, such as [`IPPROTO_TCP`].
    pub protocol: u8,
    /// Checksum of the header (RFC 1071).
    pub checksum: [u8; 2],
    /// Address of the sender.
    pub source: [u8; 4],
    /// Address of the receiver.
    pub destination: [u8; 4],
}

impl Ipv4 {
    /// Returns the header length in bytes, options included.
    #[inline(always)]
    pub fn header_len(&self) -> usize {
        (self.version_ihl & 0xf) as usize * 4
    }

    /// Reports whether this is a fragment of a packet, including the first one.
    #[inline(always)]
    pub fn is_fragment(&self) -> bool {
        u16::from_be_bytes(self.fragment) & 0x3fff != 0
    }
}

impl Ip for Ipv4 {
    type Addr = [u8; 4];
    const ETHERTYPE: u16 = ETH_P_IP;
    const LEN: usize = 20;

    #[inline(always)]
    fn is_sound(&self) -> bool {
        self.version_ihl >> 4 == 4 && self.header_len() >= Self::LEN && self.total_len() >= self.header_len() as u32
    }
    #[inline(always)]
    fn source(&self) -> [u8; 4] {
        self.source
    }
    #[inline(always)]
    fn destination(&self) -> [u8; 4] {
        self.destination
    }
    #[inline(always)]
    fn is_multicast(&self) -> bool {
        self.destination[0] & 0xf0 == 0xe0
    }
    #[inline(always)]
    fn ttl(&self) -> u8 {
        self.ttl
    }
    #[inline(always)]
    fn traffic_class(&self) -> u8 {
        self.tos
    }
    #[inline(always)]
    fn total_len(&self) -> u32 {
        u16::from_be_bytes(self.total_len) as u32
    }
    #[inline(always)]
    fn tcp_offset(&self) -> Option<usize> {
        (self.protocol == IPPROTO_TCP && !self.is_fragment()).then(|| self.header_len())
    }
    #[inline(always)]
    fn hop(&self) -> Hop {
        let ttl = self.ttl.wrapping_sub(1);
        let from = u16::from_be_bytes([self.ttl, self.protocol]);
        let to = u16::from_be_bytes([ttl, self.protocol]);
        let [c0, c1] = checksum::update(u16::from_be_bytes(self.checksum), from, to).to_be_bytes();
        Hop { offset: 8, bytes: [ttl, self.protocol, c0, c1] }
    }
}

/// IPv6 header (RFC 8200).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ipv6 {
    /// Version (6), traffic class and flow label.
    pub version_class_flow: [u8; 4],
    /// Length of everything behind this header in bytes.
    pub payload_len: [u8; 2],
    /// Type of the next header, such as [`IPPROTO_TCP`].
    pub next_header: u8,
    /// Remaining number of hops.
    pub hop_limit: u8,
    /// Address of the sender.
    pub source: [u8; 16],
    /// Address of the receiver.
    pub destination: [u8; 16],
}

impl Ip for Ipv6 {
    type Addr = [u8; 16];
    const ETHERTYPE: u16 = ETH_P_IPV6;
    const LEN: usize = 40;

    #[inline(always)]
    fn is_sound(&self) -> bool {
        self.version_class_flow[0] >> 4 == 6
    }
    #[inline(always)]
    fn source(&self) -> [u8; 16] {
        self.source
    }
    #[inline(always)]
    fn destination(&self) -> [u8; 16] {
        self.destination
    }
    #[inline(always)]
    fn is_multicast(&self) -> bool {
        self.destination[0] == 0xff
    }
    #[inline(always)]
    fn ttl(&self) -> u8 {
        self.hop_limit
    }
    #[inline(always)]
    fn traffic_class(&self) -> u8 {
        self.version_class_flow[0] << 4 | self.version_class_flow[1] >> 4
    }
    #[inline(always)]
    fn total_len(&self) -> u32 {
        Self::LEN as u32 + u16::from_be_bytes(self.payload_len) as u32
    }
    #[inline(always)]
    fn tcp_offset(&self) -> Option<usize> {
        (self.next_header == IPPROTO_TCP).then_some(Self::LEN)
    }
    #[inline(always)]
    fn hop(&self) -> Hop {
        Hop { offset: 7, bytes: [self.hop_limit.wrapping_sub(1), 0, 0, 0] }
    }
}

/// Ethernet II header.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ethernet {
    /// Destination MAC address.
    pub destination: [u8; 6],
    /// Source MAC address.
    pub source: [u8; 6],
    /// Ethernet type, such as [`ETH_P_IP`].
    pub ethertype: [u8; 2],
}

impl Ethernet {
    /// Returns the inner Ethernet header of every overlay packet.
    #[inline(always)]
    pub fn overlay(ethertype: u16) -> Self {
        Self { destination: OVERLAY_MAC, source: OVERLAY_SOURCE_MAC, ethertype: ethertype.to_be_bytes() }
    }
}

/// UDP header (RFC 768) followed by a VXLAN header (RFC 7348).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UdpVxlan {
    /// UDP source port; its value spreads flows over receive queues.
    pub source: [u8; 2],
    /// UDP destination port, [`OVERLAY_PORT`].
    pub destination: [u8; 2],
    /// UDP length in bytes, UDP header included.
    pub len: [u8; 2],
    /// UDP checksum; zero means none.
    pub checksum: [u8; 2],
    /// VXLAN flags; 0x08 marks the network identifier as valid.
    pub flags: u8,
    /// Reserved by RFC 7348; zero.
    pub reserved: [u8; 3],
    /// VXLAN network identifier, 24 bits.
    pub vni: [u8; 3],
    /// Reserved by RFC 7348; zero.
    pub reserved2: u8,
}

impl UdpVxlan {
    /// Returns the VXLAN network identifier in host order.
    #[inline(always)]
    pub fn vni(&self) -> u32 {
        u32::from_be_bytes([0, self.vni[0], self.vni[1], self.vni[2]])
    }
}

/// Headers in front of an inner packet on the overlay, without the outer Ethernet header.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OverlayHeader {
    /// Outer IPv4 header.
    pub ip: Ipv4,
    /// Outer UDP and VXLAN headers.
    pub udp: UdpVxlan,
    /// Inner Ethernet header.
    pub ethernet: Ethernet,
}

const _: () = assert!(size_of::<OverlayHeader>() == OVERLAY_OVERHEAD);
const _: () = assert!(size_of::<Ipv4>() == Ipv4::LEN && size_of::<Ipv6>() == Ipv6::LEN);

impl OverlayHeader {
    /// Builds the header for an inner packet of `inner_len` bytes (from the inner IP header on)
    /// of the family `ethertype`.
    ///
    /// The outer header forbids fragmentation (DF): the caller has checked that the inner packet fits.
    /// `traffic_class` copies DSCP and ECN of the inner packet (RFC 6040, normal mode). `hash` selects the UDP
    /// source port, which spreads flows over the receivers' queues (RFC 7348 §5). The UDP checksum is zero, as RFC
    /// 7348 recommends over IPv4.
    #[inline(always)]
    pub fn new(from: [u8; 4], to: [u8; 4], inner_len: u16, ethertype: u16, traffic_class: u8, hash: u32) -> Self {
        let total_len = inner_len.wrapping_add(OVERLAY_OVERHEAD as u16);
        let [_, v0, v1, v2] = OVERLAY_VNI.to_be_bytes();
        let mut ip = Ipv4 {
            version_ihl: 0x45,
            tos: traffic_class,
            total_len: total_len.to_be_bytes(),
            id: [0; 2],
            fragment: [0x40, 0],
            ttl: 64,
            protocol: IPPROTO_UDP,
            checksum: [0; 2],
            source: from,
            destination: to,
        };
        ip.checksum = ip.sum().to_be_bytes();
        Self {
            ip,
            udp: UdpVxlan {
                source: (0xc000 | (hash as u16 & 0x3fff)).to_be_bytes(),
                destination: OVERLAY_PORT.to_be_bytes(),
                len: total_len.wrapping_sub(Ipv4::LEN as u16).to_be_bytes(),
                checksum: [0; 2],
                flags: 0x08,
                reserved: [0; 3],
                vni: [v0, v1, v2],
                reserved2: 0,
            },
            ethernet: Ethernet::overlay(ethertype),
        }
    }
}

impl Ipv4 {
    /// Computes the header checksum in host order, with the current content of the checksum field included in the sum.
    #[inline(always)]
    fn sum(&self) -> u16 {
        let [a, b, c, d] = self.source;
        let [e, f, g, h] = self.destination;
        checksum::ipv4(&[
            self.version_ihl,
            self.tos,
            self.total_len[0],
            self.total_len[1],
            self.id[0],
            self.id[1],
            self.fragment[0],
            self.fragment[1],
            self.ttl,
            self.protocol,
            self.checksum[0],
            self.checksum[1],
            a,
            b,
            c,
            d,
            e,
            f,
            g,
            h,
        ])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlay_header_is_valid_vxlan() {
        let header = OverlayHeader::new([10, 0, 0, 11], [10, 0, 0, 12], 100, ETH_P_IPV6, 0xb9, 0xdead_beef);
        assert_eq!(header.ip.sum(), 0, "a header that contains its checksum sums to zero");
        assert_eq!(header.ip.total_len(), 150);
        assert_eq!(u16::from_be_bytes(header.udp.len), 130);
        assert_eq!(header.udp.vni(), OVERLAY_VNI);
        assert_eq!(header.ip.tos, 0xb9);
        assert!(u16::from_be_bytes(header.udp.source) >= 0xc000);
        assert_eq!(header.ethernet.ethertype, [0x86, 0xdd]);
        assert_ne!(
            header.ethernet.source, header.ethernet.destination,
            "a VXLAN device drops packets from its own MAC address as a loop"
        );
    }

    #[test]
    fn ipv4_header_with_inconsistent_lengths_is_not_sound() {
        let sound = OverlayHeader::new([1; 4], [2; 4], 0, ETH_P_IP, 0, 0).ip;
        assert!(sound.is_sound());
        assert!(!Ipv4 { version_ihl: 0x44, ..sound }.is_sound(), "header shorter than 20 bytes");
        assert!(!Ipv4 { version_ihl: 0x65, ..sound }.is_sound(), "version 6");
        assert!(!Ipv4 { total_len: [0, 19], ..sound }.is_sound(), "packet shorter than its header");
    }

    #[test]
    fn fragment_has_no_tcp_offset() {
        let tcp = Ipv4 { protocol: IPPROTO_TCP, ..OverlayHeader::new([1; 4], [2; 4], 0, ETH_P_IP, 0, 0).ip };
        assert_eq!(tcp.tcp_offset(), Some(20));
        assert_eq!(
            Ipv4 { fragment: [0x20, 0], ..tcp }.tcp_offset(),
            None,
            "first fragment: TCP options may be cut off"
        );
        assert_eq!(Ipv4 { fragment: [0, 1], ..tcp }.tcp_offset(), None);
    }

    #[test]
    fn traffic_class_of_ipv6_spans_two_bytes() {
        let header = Ipv6 {
            version_class_flow: [0x6b, 0x9f, 0xff, 0xff],
            payload_len: [0, 0],
            next_header: 59,
            hop_limit: 1,
            source: [0; 16],
            destination: [0; 16],
        };
        assert_eq!(header.traffic_class(), 0xb9);
    }
}
