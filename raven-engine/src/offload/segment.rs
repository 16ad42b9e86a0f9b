//! From an aggregate that the kernel hands to a TUN device to the packets that it stands for, as the kernel's own
//! segmentation would make them (`net/ipv4/tcp_offload.c`, `net/ipv4/udp_offload.c`).

use bytes::BytesMut;

use super::{
    checksum::Sum,
    packet::{self, CWR, FIN, Layout, PSH},
    virtio::{Checksum, Header, Kind},
};

/// The packet contradicts the header before it. This is an error of the kernel.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("the packet contradicts its virtio header")]
pub struct Malformed;

/// Divides what a TUN device returned into packets with complete checksums, each padded for WireGuard.
pub fn split(header: Header, packet: &mut [u8], mtu: usize, mut emit: impl FnMut(BytesMut)) -> Result<(), Malformed> {
    let Some((kind, size)) = header.aggregate else {
        if let Some(checksum) = header.checksum {
            complete(packet, checksum)?;
        }
        emit(padded(packet, &[], mtu));
        return Ok(());
    };
    let layout = header.checksum.and_then(|checksum| layout(packet, kind, checksum)).ok_or(Malformed)?;
    let (source, destination) = packet::addresses(packet).ok_or(Malformed)?;
    let (headers, payload) = packet.split_at_mut_checked(layout.headers).ok_or(Malformed)?;
    if size == 0 || payload.is_empty() {
        return Err(Malformed);
    }
    let first = First::of(headers, layout);
    let last = (payload.len() - 1) / size;
    for (number, part) in payload.chunks(size).enumerate() {
        first.adapt(headers, layout, number, size, part.len(), number == last);
        let length = layout.headers - layout.ip + part.len();
        let field = layout.ip + layout.checksum_offset();
        headers[field..field + 2].fill(0);
        let sum = Sum::default()
            .add_pseudo_header(source, destination, layout.protocol(), length)
            .add(&headers[layout.ip..])
            .add(part);
        headers[field..field + 2].copy_from_slice(&checksum_of(kind, sum));
        emit(padded(headers, part, mtu));
    }
    Ok(())
}

/// Where the headers of an aggregate are. Its own length fields are not used: they cannot hold more than 64 KiB.
fn layout(packet: &[u8], kind: Kind, checksum: Checksum) -> Option<Layout> {
    let is_ipv4 = packet.first()? >> 4 == 4;
    let ip = checksum.start;
    let least = if is_ipv4 { 20 } else { 40 };
    let layout = Layout::after(packet, kind, is_ipv4, ip)?;
    let is_possible = ip >= least
        && checksum.offset == layout.checksum_offset()
        && (!is_ipv4 || usize::from(packet[0] & 0x0f) * 4 == ip);
    is_possible.then_some(layout)
}

/// The fields of the aggregate's headers from which those of each segment follow.
struct First {
    identification: u16,
    sequence: u32,
    flags: u8,
}

impl First {
    fn of(headers: &[u8], layout: Layout) -> Self {
        let (sequence, flags) = match layout.kind {
            Kind::Tcp => (layout.sequence(headers), layout.flags(headers)),
            Kind::Udp => (0, 0),
        };
        Self { identification: u16::from_be_bytes([headers[4], headers[5]]), sequence, flags }
    }

    /// Writes lengths, identification, sequence number, flags and IPv4 checksum of a segment.
    fn adapt(&self, headers: &mut [u8], layout: Layout, number: usize, size: usize, payload: usize, is_last: bool) {
        let length = layout.headers + payload;
        if layout.is_ipv4 {
            headers[2..4].copy_from_slice(&(length as u16).to_be_bytes());
            headers[4..6].copy_from_slice(&self.identification.wrapping_add(number as u16).to_be_bytes());
            write_ipv4_checksum(&mut headers[..layout.ip]);
        } else {
            // The payload length of IPv6 includes extension headers (RFC 8200 §3).
            headers[4..6].copy_from_slice(&((length - 40) as u16).to_be_bytes());
        }
        let transport = &mut headers[layout.ip..];
        match layout.kind {
            Kind::Tcp => {
                let sequence = self.sequence.wrapping_add((number * size) as u32);
                transport[4..8].copy_from_slice(&sequence.to_be_bytes());
                // FIN and PSH belong to the last segment, CWR to the first (RFC 3168 §6.1.2).
                let not_here = if is_last { 0 } else { FIN | PSH } | if number == 0 { 0 } else { CWR };
                transport[13] = self.flags & !not_here;
            }
            Kind::Udp => transport[4..6].copy_from_slice(&((8 + payload) as u16).to_be_bytes()),
        }
    }
}

/// Writes the checksum of an IPv4 header.
pub(super) fn write_ipv4_checksum(header: &mut [u8]) {
    header[10..12].fill(0);
    let checksum = Sum::default().add(header).complement();
    header[10..12].copy_from_slice(&checksum);
}

/// The checksum field for a sum. In UDP, zero means "no checksum" (RFC 768).
fn checksum_of(kind: Kind, sum: Sum) -> [u8; 2] {
    match (kind, sum.complement()) {
        (Kind::Udp, [0, 0]) => [0xff, 0xff],
        (_, checksum) => checksum,
    }
}

/// Completes a checksum field, which contains the sum of the pseudo-header.
fn complete(packet: &mut [u8], Checksum { start, offset }: Checksum) -> Result<(), Malformed> {
    let sum = Sum::default().add(packet.get(start..).ok_or(Malformed)?);
    let field = packet.get_mut(start + offset..start + offset + 2).ok_or(Malformed)?;
    // The field of UDP has offset 6; zero would mean "no checksum" there, and ffff equals it elsewhere (RFC 1624 §3).
    let kind = if offset == 6 { Kind::Udp } else { Kind::Tcp };
    field.copy_from_slice(&checksum_of(kind, sum));
    Ok(())
}

/// Joins the parts and pads them with zeros to a multiple of 16 bytes, up to the MTU (WireGuard whitepaper §5.4.6).
fn padded(headers: &[u8], payload: &[u8], mtu: usize) -> BytesMut {
    let length = headers.len() + payload.len();
    let padded = length.next_multiple_of(16).min(mtu).max(length);
    let mut packet = BytesMut::with_capacity(padded);
    packet.extend_from_slice(headers);
    packet.extend_from_slice(payload);
    packet.resize(padded, 0);
    packet
}
