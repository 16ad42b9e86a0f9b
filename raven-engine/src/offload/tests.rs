//! Properties of segmentation and aggregation. The packets that they must make are built independently, by etherparse.

use std::{collections::BTreeMap, io::IoSlice};

use bytes::BytesMut;
use etherparse::{IpNumber, Ipv4Options, NetSlice, PacketBuilder, SlicedPacket, TransportSlice};
use proptest::{collection::vec, prelude::*, sample::select};

use super::{
    Checksum, Coalescer, Header, Kind, Malformed,
    packet::{ACK, CWR, ECE, FIN, Layout, PSH},
    segment::write_ipv4_checksum,
    split,
};

const SYN: u8 = 0x02;
const RST: u8 = 0x04;

/// A packet to build.
#[derive(Clone, Debug)]
struct Spec {
    is_ipv4: bool,
    kind: Kind,
    /// Distinguishes flows.
    port: u16,
    tos: u8,
    ttl: u8,
    identification: u16,
    dont_fragment: bool,
    sequence: u32,
    flags: u8,
    window: u16,
    timestamp: Option<u32>,
    payload: Vec<u8>,
}

impl Spec {
    fn build(&self) -> Vec<u8> {
        let builder = if self.is_ipv4 {
            let mut header = etherparse::Ipv4Header::new(0, self.ttl, IpNumber(0), [10, 0, 0, 1], [10, 0, 0, 2])
                .expect("no payload yet");
            (header.dscp, header.ecn) = split_tos(self.tos);
            header.identification = self.identification;
            header.dont_fragment = self.dont_fragment;
            PacketBuilder::ip(etherparse::IpHeaders::Ipv4(header, Default::default()))
        } else {
            let header = etherparse::Ipv6Header {
                traffic_class: self.tos,
                hop_limit: self.ttl,
                source: [0xfd; 16],
                destination: [0xfe; 16],
                ..Default::default()
            };
            PacketBuilder::ip(etherparse::IpHeaders::Ipv6(header, Default::default()))
        };
        let mut bytes = Vec::new();
        match self.kind {
            Kind::Udp => builder.udp(self.port, 53).write(&mut bytes, &self.payload).expect("it fits"),
            Kind::Tcp => {
                let mut header = etherparse::TcpHeader::new(self.port, 443, self.sequence, self.window);
                header.acknowledgment_number = 7;
                for (flag, field) in [
                    (FIN, &mut header.fin),
                    (SYN, &mut header.syn),
                    (RST, &mut header.rst),
                    (PSH, &mut header.psh),
                    (ACK, &mut header.ack),
                    (ECE, &mut header.ece),
                    (CWR, &mut header.cwr),
                ] {
                    *field = self.flags & flag != 0;
                }
                if let Some(time) = self.timestamp {
                    header.set_options(&[etherparse::TcpOptionElement::Timestamp(time, 1)]).expect("10 bytes fit");
                }
                builder.tcp_header(header).write(&mut bytes, &self.payload).expect("it fits");
            }
        }
        bytes
    }
}

fn split_tos(tos: u8) -> (etherparse::IpDscp, etherparse::IpEcn) {
    (etherparse::IpDscp::try_new(tos >> 2).expect("6 bits"), etherparse::IpEcn::try_new(tos & 3).expect("2 bits"))
}

fn spec() -> impl Strategy<Value = Spec> {
    let flags = prop_oneof![
        20 => Just(ACK), 4 => Just(ACK | PSH), 2 => Just(ACK | ECE), 1 => Just(ACK | CWR), 1 => Just(ACK | FIN),
        1 => Just(SYN), 1 => Just(RST)
    ];
    let length = prop_oneof![8 => Just(100usize), 1 => Just(0), 1 => Just(99), 1 => Just(101), 1 => 1..1400usize];
    (
        (any::<bool>(), select(vec![Kind::Tcp, Kind::Tcp, Kind::Udp]), 1..4u16),
        (prop_oneof![9 => Just(0u8), 1 => any::<u8>()], prop_oneof![9 => Just(64u8), 1 => 1..255u8]),
        (prop_oneof![3 => Just(0u16), 1 => any::<u16>()], any::<bool>()),
        flags,
        (prop_oneof![9 => Just(500u16), 1 => any::<u16>()], prop_oneof![3 => Just(None), 1 => Just(Some(9u32))]),
        length.prop_flat_map(|length| vec(any::<u8>(), length)),
    )
        .prop_map(
            |(
                (is_ipv4, kind, port),
                (tos, ttl),
                (identification, dont_fragment),
                flags,
                (window, timestamp),
                payload,
            )| {
                Spec {
                    is_ipv4,
                    kind,
                    port,
                    tos,
                    ttl,
                    identification,
                    dont_fragment,
                    sequence: 0,
                    flags,
                    window,
                    timestamp,
                    payload,
                }
            },
        )
}

/// What happens to a packet on its way.
#[derive(Clone, Copy, Debug)]
enum Damage {
    None,
    Flip(usize),
    Truncate(usize),
}

fn damage() -> impl Strategy<Value = Damage> {
    prop_oneof![30 => Just(Damage::None), 1 => any::<usize>().prop_map(Damage::Flip), 1 => any::<usize>().prop_map(Damage::Truncate)]
}

/// Packets of several flows. Within a flow, sequence numbers and identifications continue, except where `jump` is set.
fn traffic() -> impl Strategy<Value = Vec<Vec<u8>>> {
    vec((spec(), prop_oneof![9 => Just(false), 1 => Just(true)], damage()), 1..120).prop_map(|specs| {
        let mut next: BTreeMap<(bool, bool, u16), (u32, u16)> = BTreeMap::new();
        let build = |(mut spec, jump, damage): (Spec, bool, Damage)| {
            let flow = (spec.is_ipv4, spec.kind == Kind::Tcp, spec.port);
            // Near the end of the numbers, so that they wrap.
            let (sequence, identification) = next.entry(flow).or_insert((u32::MAX - 250, u16::MAX - 2));
            if jump {
                *sequence = sequence.wrapping_add(1);
                *identification = identification.wrapping_add(1);
            }
            spec.sequence = *sequence;
            spec.identification = if spec.dont_fragment { spec.identification } else { *identification };
            *sequence = sequence.wrapping_add(spec.payload.len() as u32);
            *identification = identification.wrapping_add(1);
            let mut packet = spec.build();
            match damage {
                Damage::None => {}
                Damage::Flip(bit) => packet[bit / 8 % spec.build().len()] ^= 1 << (bit % 8),
                Damage::Truncate(length) => packet.truncate(1 + length % spec.build().len()),
            }
            packet
        };
        specs.into_iter().map(build).collect()
    })
}

/// What a TUN device would receive: virtio headers and packets.
fn written(coalescer: &mut Coalescer) -> Vec<(Header, Vec<u8>)> {
    let mut all = Vec::new();
    coalescer.drain(|parts| {
        let bytes: Vec<u8> = parts.iter().flat_map(|part: &IoSlice<'_>| part.iter().copied()).collect();
        let (header, packet) = bytes.split_first_chunk().expect("a virtio header");
        all.push((Header::parse(*header).expect("a valid header"), packet.to_vec()));
    });
    all
}

fn divided(header: Header, packet: &[u8]) -> Result<Vec<Vec<u8>>, Malformed> {
    let mut packets = Vec::new();
    split(header, &mut packet.to_vec(), 0, |packet| packets.push(packet.to_vec())).map(|()| packets)
}

/// The packet without what aggregation may change: the identification of an IPv4 packet that must not be fragmented.
fn normal(packet: &[u8]) -> Vec<u8> {
    let mut packet = packet.to_vec();
    let is_atomic = Layout::of(&packet).is_some_and(|layout| layout.is_ipv4 && packet[6] & 0x40 != 0);
    let has_checksum = |packet: &[u8]| {
        let mut copy = packet[..20].to_vec();
        write_ipv4_checksum(&mut copy);
        copy == packet[..20]
    };
    if is_atomic && has_checksum(&packet) {
        packet[4..6].fill(0);
        write_ipv4_checksum(&mut packet[..20]);
    }
    packet
}

/// Version of IP, protocol, addresses and ports. None: neither TCP nor UDP.
type Flow = Option<(bool, u8, Vec<u8>, Vec<u8>)>;

/// Packets by flow, each flow in its order.
fn by_flow(packets: &[Vec<u8>]) -> BTreeMap<Flow, Vec<Vec<u8>>> {
    let mut flows: BTreeMap<_, Vec<Vec<u8>>> = BTreeMap::new();
    for packet in packets {
        let flow = Layout::of(packet).map(|layout| {
            let addresses = if layout.is_ipv4 { &packet[12..20] } else { &packet[8..40] };
            (layout.is_ipv4, layout.protocol(), addresses.to_vec(), packet[layout.ip..layout.ip + 4].to_vec())
        });
        flows.entry(flow).or_default().push(normal(packet));
    }
    flows
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    /// Joining and dividing gives the same packets, in the same order within each flow.
    #[test]
    fn what_is_joined_is_divided_into_the_same_packets(packets in traffic(), udp in any::<bool>()) {
        let mut coalescer = Coalescer::new(udp);
        for packet in &packets {
            coalescer.push(BytesMut::from(packet.as_slice()));
        }
        let mut after = Vec::new();
        for (header, packet) in written(&mut coalescer) {
            after.extend(divided(header, &packet).expect("own aggregates are well-formed"));
        }
        prop_assert_eq!(by_flow(&packets), by_flow(&after));
        prop_assert_eq!(written(&mut coalescer), vec![], "packets were kept");
    }

    /// An aggregate is divided into the packets that etherparse would build.
    #[test]
    fn aggregate_is_divided_as_if_each_segment_was_built(
        mut spec in spec(),
        size in 1..1400usize,
        payload in vec(any::<u8>(), 1..20_000),
        sequence in any::<u32>(),
    ) {
        spec.sequence = sequence;
        spec.flags |= ACK;
        spec.payload.clone_from(&payload);
        let mut aggregate = spec.build();
        let layout = Layout::of(&aggregate).expect("a plain packet");
        let checksum = Checksum { start: layout.ip, offset: layout.checksum_offset() };
        // The kernel fills the field with the sum of the pseudo-header, which `split` ignores.
        aggregate[layout.ip + checksum.offset] ^= 0x55;
        let header = Header { checksum: Some(checksum), aggregate: Some((spec.kind, size)) };
        let segments = divided(header, &aggregate).expect("a well-formed aggregate");
        let count = payload.len().div_ceil(size);
        let expected: Vec<Vec<u8>> = payload.chunks(size).enumerate().map(|(number, part)| {
            let is_last = number + 1 == count;
            let not_here = if is_last { 0 } else { FIN | PSH } | if number == 0 { 0 } else { CWR };
            Spec {
                identification: spec.identification.wrapping_add(number as u16),
                sequence: sequence.wrapping_add((number * size) as u32),
                flags: spec.flags & !not_here,
                payload: part.to_vec(),
                ..spec.clone()
            }.build()
        }).collect();
        prop_assert_eq!(segments, expected);
    }

    /// A single packet's checksum is completed.
    #[test]
    fn incomplete_checksum_is_completed(mut spec in spec()) {
        spec.flags = ACK;
        let expected = spec.build();
        let layout = Layout::of(&expected).expect("a plain packet");
        let checksum = Checksum { start: layout.ip, offset: layout.checksum_offset() };
        let mut packet = expected.clone();
        let field = checksum.start + checksum.offset;
        let (source, destination) = super::addresses(&packet).expect("an IP packet");
        let pseudo = super::checksum::Sum::default()
            .add_pseudo_header(source, destination, layout.protocol(), packet.len() - layout.ip);
        packet[field..field + 2].copy_from_slice(&pseudo.fold());
        let header = Header { checksum: Some(checksum), aggregate: None };
        prop_assert_eq!(divided(header, &packet), Ok(vec![expected]));
    }

    /// Whatever the kernel returns, nothing panics, and no packet is longer than the aggregate.
    #[test]
    fn any_header_with_any_packet_is_divided_or_refused(
        packet in vec(any::<u8>(), 0..200),
        start in 0..300usize, offset in 0..300usize, size in 0..300usize,
        kind in select(vec![None, Some(Kind::Tcp), Some(Kind::Udp)]), has_checksum in any::<bool>(),
    ) {
        let checksum = has_checksum.then_some(Checksum { start, offset });
        let header = Header { checksum, aggregate: kind.map(|kind| (kind, size)) };
        for segment in divided(header, &packet).unwrap_or_default() {
            prop_assert!(segment.len() <= packet.len());
        }
    }
}

fn tcp(sequence: u32, flags: u8, payload: usize) -> Spec {
    Spec {
        is_ipv4: true,
        kind: Kind::Tcp,
        port: 1000,
        tos: 0,
        ttl: 64,
        identification: 1,
        dont_fragment: true,
        sequence,
        flags,
        window: 500,
        timestamp: Some(1),
        payload: vec![1; payload],
    }
}

/// How many packets each write contains.
fn counts(packets: &[Vec<u8>]) -> Vec<usize> {
    let mut coalescer = Coalescer::new(true);
    packets.iter().for_each(|packet| coalescer.push(BytesMut::from(packet.as_slice())));
    written(&mut coalescer)
        .iter()
        .map(|(header, packet)| divided(*header, packet).expect("well-formed").len())
        .collect()
}

#[test]
fn consecutive_segments_are_joined_until_one_is_pushed_or_shorter() {
    let stream = |flags: [u8; 4], lengths: [usize; 4]| {
        let mut sequence = 0;
        let packet = |(flags, length): (&u8, &usize)| {
            let packet = tcp(sequence, *flags, *length).build();
            sequence += *length as u32;
            packet
        };
        flags.iter().zip(&lengths).map(packet).collect::<Vec<_>>()
    };
    assert_eq!(counts(&stream([ACK; 4], [1000; 4])), [4]);
    assert_eq!(counts(&stream([ACK, ACK | PSH, ACK, ACK], [1000; 4])), [2, 2]);
    assert_eq!(counts(&stream([ACK; 4], [1000, 500, 1000, 1000])), [2, 2]);
    assert_eq!(counts(&stream([ACK; 4], [500, 1000, 1000, 1000])), [1, 3]);
    assert_eq!(counts(&stream([ACK, ACK | FIN, ACK, ACK], [1000; 4])), [1, 1, 2]);
    assert_eq!(counts(&stream([ACK; 4], [0; 4])), [1, 1, 1, 1], "acknowledgements alone");
}

#[test]
fn packet_with_a_wrong_checksum_is_not_joined() {
    let mut packets: Vec<Vec<u8>> = (0..3).map(|n| tcp(n * 100, ACK, 100).build()).collect();
    let last = packets[1].len() - 1;
    packets[1][last] ^= 1;
    assert_eq!(counts(&packets), [1, 1, 1]);
    packets.swap(0, 1);
    assert_eq!(counts(&packets[..1]), [1]);
}

#[test]
fn packets_with_ip_options_extension_headers_or_fragments_are_left_alone() {
    let mut fragment = tcp(0, ACK, 100);
    fragment.dont_fragment = false;
    let mut fragment = fragment.build();
    fragment[6] = 0x20;
    write_ipv4_checksum(&mut fragment[..20]);
    let options = {
        let mut header = etherparse::Ipv4Header::new(0, 64, IpNumber(0), [10, 0, 0, 1], [10, 0, 0, 2]).expect("fits");
        header.options = Ipv4Options::try_from(&[1u8, 1, 1, 1][..]).expect("4 bytes");
        let mut bytes = Vec::new();
        let builder = PacketBuilder::ip(etherparse::IpHeaders::Ipv4(header, Default::default()));
        builder.tcp(1, 2, 3, 4).write(&mut bytes, &[1; 100]).expect("it fits");
        bytes
    };
    let extension = {
        let mut packet = Spec { is_ipv4: false, ..tcp(0, ACK, 100) }.build();
        // Hop-by-hop options: 8 bytes of padding before TCP.
        packet.splice(40..40, [6, 0, 1, 4, 0, 0, 0, 0]);
        packet[6] = 0;
        let length = (packet.len() as u16 - 40).to_be_bytes();
        packet[4..6].copy_from_slice(&length);
        packet
    };
    for packet in [fragment, options, extension] {
        assert_eq!(Layout::of(&packet), None, "{packet:?}");
        assert_eq!(counts(&[packet.clone(), packet]), [1, 1]);
    }
}

#[test]
fn aggregate_has_the_headers_that_the_kernel_expects() {
    let mut coalescer = Coalescer::new(false);
    for n in 0..3 {
        let flags = if n == 2 { ACK | PSH } else { ACK };
        coalescer.push(BytesMut::from(tcp(n * 100, flags, 100).build().as_slice()));
    }
    let all = written(&mut coalescer);
    let [(header, packet)] = &all[..] else { panic!("{} writes", all.len()) };
    assert_eq!(header.aggregate, Some((Kind::Tcp, 100)));
    assert_eq!(header.checksum, Some(Checksum { start: 20, offset: 16 }));
    let parsed = SlicedPacket::from_ip(packet).expect("a packet");
    let Some(NetSlice::Ipv4(ip)) = parsed.net else { panic!("not IPv4") };
    assert_eq!(usize::from(ip.header().total_len()), packet.len());
    assert_eq!(ip.header().header_checksum(), ip.header().to_header().calc_header_checksum());
    let Some(TransportSlice::Tcp(tcp)) = parsed.transport else { panic!("not TCP") };
    assert!(tcp.psh(), "the last segment's PSH");
    assert_eq!(tcp.payload().len(), 300);
}

#[test]
fn packets_are_padded_to_16_bytes_but_not_beyond_the_mtu() {
    let padded = |length: usize, mtu: usize| {
        let mut packet = vec![0x45; length];
        let mut lengths = Vec::new();
        let header = Header { checksum: None, aggregate: None };
        split(header, &mut packet, mtu, |packet| lengths.push(packet.len())).expect("well-formed");
        lengths
    };
    assert_eq!(padded(100, 1420), [112]);
    assert_eq!(padded(1418, 1420), [1420]);
    assert_eq!(padded(1430, 1420), [1430], "a packet from before a change of the MTU");
    assert_eq!(padded(96, 1420), [96]);
}
