//! From decrypted packets to aggregates, so that the kernel's stack and Raven's programs run once for many packets.
//!
//! Only what [`super::split`] would divide into the same packets again is joined: the rules of the kernel's receive
//! offload (`net/core/gro.c`, `net/ipv4/tcp_offload.c`), with one exception that RFC 6864 §4 allows: the identification
//! of packets that must not be fragmented is not preserved.

use std::{collections::HashMap, io::IoSlice};

use bytes::BytesMut;

use super::{
    checksum::Sum,
    packet::{self, ACK, ECE, Layout, PSH},
    segment::write_ipv4_checksum,
    virtio::{self, Checksum, Header, Kind},
};

/// Packets of one aggregate: the kernel's limit for UDP (`UDP_MAX_SEGMENTS`), and enough for TCP.
const PACKETS: usize = 64;
/// Length of an aggregate in bytes, by the length fields of IP.
const BYTES: usize = 65_535;
const DONT_FRAGMENT: u8 = 0x40;

/// What is equal in all packets of a flow: addresses and ports.
type Flow = (Kind, [u8; 36]);

/// Decrypted packets in the order of their arrival, joined where that is possible.
pub struct Coalescer {
    udp: bool,
    groups: Vec<Group>,
    /// Per flow, the group to which its next packet may be added.
    open: HashMap<Flow, usize>,
}

struct Group {
    packets: Vec<BytesMut>,
    /// None: the packet cannot be joined with others.
    joined: Option<Joined>,
}

/// The state of a group that may grow.
struct Joined {
    layout: Layout,
    /// Payload of the first packet in bytes.
    size: usize,
    /// Bytes of headers and payload.
    length: usize,
    /// Sequence number that the next packet must have.
    next: u32,
    /// True if the first packet's checksum is verified.
    is_verified: bool,
}

impl Coalescer {
    /// Without packets. `udp`: the kernel accepts aggregates of UDP (Linux 6.2).
    pub fn new(udp: bool) -> Self {
        Self { udp, groups: Vec::new(), open: HashMap::new() }
    }

    /// Adds a packet of exactly its own length.
    pub fn push(&mut self, packet: BytesMut) {
        let layout = Layout::of(&packet).filter(|layout| layout.kind == Kind::Tcp || self.udp);
        let Some(layout) = layout else {
            return self.groups.push(Group { packets: vec![packet], joined: None });
        };
        let flow = flow(&packet, layout);
        if let Some(&at) = self.open.get(&flow) {
            match self.groups[at].add(packet, layout) {
                Ok(Open(true)) => return,
                Ok(Open(false)) => {
                    self.open.remove(&flow);
                    return;
                }
                Err(packet) => return self.start(packet, layout, flow),
            }
        }
        self.start(packet, layout, flow);
    }

    /// Starts a group, which takes the place of the flow's previous one.
    fn start(&mut self, packet: BytesMut, layout: Layout, flow: Flow) {
        let joined = Joined::of(&packet, layout);
        if joined.is_some() {
            self.open.insert(flow, self.groups.len());
        } else {
            self.open.remove(&flow);
        }
        self.groups.push(Group { packets: vec![packet], joined });
    }

    /// Hands each packet or aggregate to `write` as a virtio header and the parts of the packet, and forgets them.
    pub fn drain(&mut self, mut write: impl FnMut(&[IoSlice<'_>])) {
        self.open.clear();
        for group in self.groups.drain(..) {
            match group.joined.filter(|_| group.packets.len() > 1) {
                None => group
                    .packets
                    .iter()
                    .for_each(|packet| write(&[IoSlice::new(&Header::COMPLETE), IoSlice::new(packet)])),
                Some(joined) => {
                    let (header, headers) = joined.headers(&group.packets);
                    let mut parts = vec![IoSlice::new(&header), IoSlice::new(&headers)];
                    parts.extend(group.packets.iter().map(|packet| IoSlice::new(&packet[joined.layout.headers..])));
                    write(&parts);
                }
            }
        }
    }
}

/// Whether a group may grow further.
struct Open(bool);

impl Group {
    /// Adds a packet, or returns it if it does not continue the group.
    fn add(&mut self, packet: BytesMut, layout: Layout) -> Result<Open, BytesMut> {
        let (Some(joined), Some(first)) = (&mut self.joined, self.packets.first()) else { return Err(packet) };
        let payload = packet.len() - layout.headers;
        let continues = joined.layout == layout
            && payload > 0
            && payload <= joined.size
            && joined.length + payload <= BYTES
            && joined.continues(first, &packet, self.packets.len());
        if !continues || !verify(&packet, layout) {
            return Err(packet);
        }
        if !joined.is_verified {
            if !verify(first, layout) {
                return Err(packet);
            }
            joined.is_verified = true;
        }
        joined.length += payload;
        joined.next = joined.next.wrapping_add(payload as u32);
        let is_pushed = layout.kind == Kind::Tcp && layout.flags(&packet) & PSH != 0;
        self.packets.push(packet);
        Ok(Open(payload == joined.size && !is_pushed && self.packets.len() < PACKETS))
    }
}

impl Joined {
    /// The state of a group with one packet. None if no packet may follow it.
    fn of(packet: &[u8], layout: Layout) -> Option<Self> {
        let size = packet.len() - layout.headers;
        let may_grow = match layout.kind {
            // A segment with PSH, FIN, SYN, RST, URG or CWR is the last of an aggregate, or alone.
            Kind::Tcp => layout.flags(packet) & !ECE == ACK,
            // Without a checksum, the kernel's segments would have one.
            Kind::Udp => packet[layout.ip + 6..layout.ip + 8] != [0, 0],
        };
        let next = match layout.kind {
            Kind::Tcp => layout.sequence(packet).wrapping_add(size as u32),
            Kind::Udp => 0,
        };
        (may_grow && size > 0).then_some(Self { layout, size, length: packet.len(), next, is_verified: false })
    }

    /// True if the headers of a packet are those that segmentation would make for it.
    fn continues(&self, first: &[u8], packet: &[u8], number: usize) -> bool {
        let Layout { kind, is_ipv4, ip, headers } = self.layout;
        let ip_continues = if is_ipv4 {
            let identification = |packet: &[u8]| u16::from_be_bytes([packet[4], packet[5]]);
            // Version, type of service; flags; time to live.
            first[..2] == packet[..2]
                && first[6] == packet[6]
                && first[8] == packet[8]
                && (first[6] & DONT_FRAGMENT != 0
                    || identification(packet) == identification(first).wrapping_add(number as u16))
        } else {
            // Version, traffic class, flow label; hop limit.
            first[..4] == packet[..4] && first[7] == packet[7]
        };
        let transport_continues = match kind {
            Kind::Udp => packet[ip + 6..ip + 8] != [0, 0],
            Kind::Tcp => {
                self.layout.sequence(packet) == self.next
                    // Acknowledgement; window and urgent pointer; options.
                    && first[ip + 8..ip + 13] == packet[ip + 8..ip + 13]
                    && self.layout.flags(first) == self.layout.flags(packet) & !PSH
                    && first[ip + 14..ip + 16] == packet[ip + 14..ip + 16]
                    && first[ip + 18..headers] == packet[ip + 18..headers]
            }
        };
        ip_continues && transport_continues
    }

    /// The virtio header and the packet headers of an aggregate.
    fn headers(&self, packets: &[BytesMut]) -> ([u8; virtio::LENGTH], Vec<u8>) {
        let Layout { kind, is_ipv4, ip, headers } = self.layout;
        let (first, last) = (&packets[0], &packets[packets.len() - 1]);
        let mut bytes = first[..headers].to_vec();
        if is_ipv4 {
            bytes[2..4].copy_from_slice(&(self.length as u16).to_be_bytes());
            write_ipv4_checksum(&mut bytes[..ip]);
        } else {
            bytes[4..6].copy_from_slice(&((self.length - ip) as u16).to_be_bytes());
        }
        match kind {
            Kind::Tcp => bytes[ip + 13] |= self.layout.flags(last) & PSH,
            Kind::Udp => bytes[ip + 4..ip + 6].copy_from_slice(&((self.length - ip) as u16).to_be_bytes()),
        }
        let checksum = Checksum { start: ip, offset: self.layout.checksum_offset() };
        let field = ip + checksum.offset;
        bytes[field..field + 2].copy_from_slice(&pseudo_header(first, self.layout, self.length - ip).fold());
        (Header::of_aggregate(kind, is_ipv4, headers, self.size, checksum), bytes)
    }
}

/// Addresses and ports.
fn flow(packet: &[u8], layout: Layout) -> Flow {
    let mut key = [0; 36];
    let addresses = if layout.is_ipv4 { &packet[12..20] } else { &packet[8..40] };
    key[..4].copy_from_slice(&packet[layout.ip..layout.ip + 4]);
    key[4..4 + addresses.len()].copy_from_slice(addresses);
    (layout.kind, key)
}

fn pseudo_header(packet: &[u8], layout: Layout, length: usize) -> Sum {
    match packet::addresses(packet) {
        Some((source, destination)) => Sum::default().add_pseudo_header(source, destination, layout.protocol(), length),
        None => Sum::default(),
    }
}

/// True if both checksums are right: the kernel does not verify those of an aggregate.
fn verify(packet: &[u8], layout: Layout) -> bool {
    let transport = &packet[layout.ip..];
    (!layout.is_ipv4 || Sum::default().add(&packet[..layout.ip]).is_valid())
        && pseudo_header(packet, layout, transport.len()).add(transport).is_valid()
}
