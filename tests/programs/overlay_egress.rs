//! Tests of `overlay_egress`: packets that leave a member for another pool.

use raven_agent::bpf::Hook;
use raven_common::{Verdict, header::ETH_LEN, tables::Count};
use raven_tests::require_root;

use crate::{
    case::{Case, check},
    dataplane::Dataplane,
    packet::{
        ACK, Family, Packet, SYN, assert_from_vxlan_device, assert_sound, ethernet, extended_syn, icmp_error,
        later_fragment, sent_by, tcp, udp,
    },
    testbed::Testbed,
    topology::{
        self, EDGE, EDGES, FAR, FARS, GATEWAY, KUBELET, LOST, LOSTS, ME, MEMBER, MEMBERS, MINE, NONE, Net, TUNNEL_MTU,
        UNKNOWN,
    },
};

/// Expects that the packet passes with a tunnel key, as `after`.
fn encapsulated(name: &str, before: &Packet, after: &Packet) -> Case {
    Case::new(format!("{:?}: {name}", before.family), before.frame())
        .passes(EDGE, Verdict::Encapsulated)
        .becomes(after.overlay_frame())
}

#[test]
fn packets_for_another_pool_get_overlay_source_mac() {
    require_root!();
    let dataplane = Dataplane::load(topology::member());
    for family in Family::BOTH {
        let datagram = udp(family, MINE, EDGES);
        let segment = tcp(family, MINE, EDGES, ACK, &[]).data(b"odd");
        check(
            &dataplane,
            Hook::OverlayEgress,
            &[
                encapsulated("a datagram", &datagram, &datagram),
                encapsulated("a segment", &segment, &segment),
                encapsulated(
                    "TTL and traffic class are unchanged",
                    &datagram.clone().ttl(1).class(0xbb),
                    &datagram.clone().ttl(1).class(0xbb),
                ),
                encapsulated(
                    "a datagram of the tunnel's MTU",
                    &datagram.clone().len(1420),
                    &datagram.clone().len(1420),
                ),
                encapsulated("an aggregate of five segments", &segment.clone().len(2000), &segment.clone().len(2000))
                    .aggregate(5, 400),
                Case::new("a third pool", udp(family, MINE, FARS).frame())
                    .passes(FAR, Verdict::Encapsulated)
                    .becomes(udp(family, MINE, FARS).overlay_frame()),
            ],
        );
    }
}

/// Returns packets without a TCP or UDP header behind the IP header. Programs use the IP header only and
/// must not change them.
pub(crate) fn neither_tcp_nor_udp(from: Net, to: Net) -> Vec<(&'static str, Packet)> {
    let mut all: Vec<(&str, Packet)> =
        Family::BOTH.iter().map(|family| ("an ICMP error", icmp_error(*family, from, to))).collect();
    all.push(("a SYN behind an extension header", extended_syn(from, to)));
    all.push(("a later fragment", later_fragment(from, to)));
    all
}

#[test]
fn icmp_errors_extension_headers_and_fragments_are_unchanged() {
    require_root!();
    let cases = neither_tcp_nor_udp(MINE, EDGES)
        .iter()
        .map(|(name, packet)| encapsulated(name, packet, packet))
        .collect::<Vec<_>>();
    check(&Dataplane::load(topology::member()), Hook::OverlayEgress, &cases);
}

#[test]
fn invalid_packets_are_dropped_and_counted() {
    require_root!();
    let dataplane = Dataplane::load(topology::member());
    let mut cases =
        vec![Case::new("ARP", ethernet([0xff; 6], [2; 6], [0x08, 0x06], &[0; 46])).dropped(NONE, Verdict::DropNotIp)];
    for family in Family::BOTH {
        let good = udp(family, MINE, EDGES).frame();
        cases.extend(malformed(family, &good, ETH_LEN));
        cases.extend([
            Case::new(format!("{family:?}: to an unknown prefix"), udp(family, MINE, UNKNOWN).frame())
                .dropped(NONE, Verdict::DropNoRoute),
            Case::new(format!("{family:?}: to a node of this pool"), udp(family, MINE, MEMBERS).frame())
                .dropped(NONE, Verdict::DropNoRoute),
            Case::new(format!("{family:?}: from another node"), udp(family, MEMBERS, EDGES).frame())
                .dropped(EDGE, Verdict::DropSourceNotMine),
            Case::new(format!("{family:?}: from an unknown prefix"), udp(family, UNKNOWN, EDGES).frame())
                .dropped(EDGE, Verdict::DropSourceNotMine),
            Case::new(format!("{family:?}: from another pool"), udp(family, FARS, EDGES).frame())
                .dropped(EDGE, Verdict::DropSourceNotMine),
            Case::new(format!("{family:?}: to a pool without gateway node"), udp(family, MINE, LOSTS).frame())
                .dropped(LOST, Verdict::DropNoGateway),
        ]);
    }
    check(&dataplane, Hook::OverlayEgress, &cases);
}

#[test]
fn node_address_may_be_used_for_the_proxy_only() {
    require_root!();
    let mut dataplane = Dataplane::load(topology::member());
    dataplane.intercept_kubelet(EDGE, GATEWAY);
    let frame = |packet: &Packet, source: [u8; 4]| sent_by(packet.frame(), source);
    for family in Family::BOTH {
        let segment = tcp(family, MINE, KUBELET, ACK, &[]);
        let datagram = udp(family, MINE, KUBELET);
        let to_pod = tcp(family, MINE, EDGES, ACK, &[]);
        let case = |name: &str, frame: Vec<u8>| Case::new(format!("{family:?}: {name}"), frame);
        check(
            &dataplane,
            Hook::OverlayEgress,
            &[
                case("the node's pod", segment.frame())
                    .passes(EDGE, Verdict::Encapsulated)
                    .becomes(segment.overlay_frame()),
                case("the node", frame(&segment, ME))
                    .passes(EDGE, Verdict::Encapsulated)
                    .becomes(sent_by(segment.overlay_frame(), ME)),
                case("another node", frame(&segment, MEMBER)).dropped(EDGE, Verdict::DropSourceNotMine),
                case("the node, not TCP", frame(&datagram, ME)).dropped(EDGE, Verdict::DropSourceNotMine),
                case("the node, to another pool's pod", frame(&to_pod, ME)).dropped(EDGE, Verdict::DropSourceNotMine),
            ],
        );
    }
}

/// Returns packets whose headers are inconsistent with each other or with the packet's length. They are dropped and
/// counted for no Gateway. `l3` is the offset of the IP header.
///
/// Truncated headers are tested with devices, because Linux 6.18 rejects test runs with them.
pub(crate) fn malformed(family: Family, good: &[u8], l3: usize) -> Vec<Case> {
    let edited = |name: &str, edit: &dyn Fn(&mut Vec<u8>)| {
        let mut packet = good.to_vec();
        edit(&mut packet);
        Case::new(format!("{family:?}: {name}"), packet).dropped(NONE, Verdict::DropMalformed)
    };
    let mut cases = vec![
        edited("last byte missing", &|p| p.truncate(p.len() - 1)),
        edited("version 5", &|p| p[l3] = 0x50 | p[l3] & 0xf),
        edited("version of the other family", &|p| p[l3] = if family == Family::V4 { 0x65 } else { 0x40 }),
    ];
    match family {
        Family::V4 => cases.extend([
            edited("header of 16 bytes", &|p| p[l3] = 0x44),
            edited("shorter than its header", &|p| p[l3 + 2..l3 + 4].copy_from_slice(&[0, 19])),
            edited("length field 65,535", &|p| p[l3 + 2..l3 + 4].copy_from_slice(&[0xff, 0xff])),
        ]),
        Family::V6 => {
            cases.push(edited("length of 65,575 bytes", &|p| p[l3 + 4..l3 + 6].copy_from_slice(&[0xff, 0xff])));
        }
    }
    cases
}

/// Returns the MSS that fits into the tunnel.
pub(crate) fn fitting_mss(family: Family) -> u16 {
    TUNNEL_MTU as u16 - family.header_len() as u16 - 20
}

/// Returns SYNs with the expected results, which are the same for both programs that clamp the MSS.
pub(crate) fn syns(family: Family) -> Vec<(String, Packet, Packet)> {
    let limit = fitting_mss(family);
    // 0xbeef in a list of options is replaced by the MSS.
    let options = |template: &[u16], mss: u16| -> Vec<u8> {
        template.iter().flat_map(|o| if *o == 0xbeef { mss.to_be_bytes().to_vec() } else { vec![*o as u8] }).collect()
    };
    let syn = |flags: u8, options: &[u8]| tcp(family, MINE, EDGES, flags, options);
    let mut all = Vec::new();
    let lowered: [(&str, &[u16]); 7] = [
        ("MSS first", &[2, 4, 0xbeef]),
        ("MSS at an odd byte", &[1, 2, 4, 0xbeef, 1, 1, 0]),
        ("MSS after two NOPs", &[1, 1, 2, 4, 0xbeef, 1, 0]),
        ("MSS after three NOPs", &[1, 1, 1, 2, 4, 0xbeef, 0]),
        ("MSS last, behind SACK and timestamps", &[4, 2, 8, 10, 1, 2, 3, 4, 5, 6, 7, 8, 2, 4, 0xbeef]),
        ("MSS behind an unknown option, at an odd byte", &[253, 3, 99, 2, 4, 0xbeef, 0]),
        ("MSS as the twentieth option", &[1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 4, 0xbeef, 0]),
    ];
    for (name, template) in lowered {
        for old in [limit + 1, 1460, 8960, 0xffff] {
            let (before, after) = (syn(SYN, &options(template, old)), syn(SYN, &options(template, limit)));
            all.push((format!("{name}, {old}"), before, after));
        }
    }
    let before = options(&[1, 2, 4, 0xbeef, 1, 1, 0], 1460);
    let after = options(&[1, 2, 4, 0xbeef, 1, 1, 0], limit);
    all.push(("SYN-ACK".to_owned(), syn(SYN | ACK, &before), syn(SYN | ACK, &after)));
    all.push(("SYN with ECN flags".to_owned(), syn(SYN | 0xc0, &before), syn(SYN | 0xc0, &after)));
    all.push(("SYN with data".to_owned(), syn(SYN, &before).data(b"odd"), syn(SYN, &after).data(b"odd")));
    let unchanged: [(&str, u8, Vec<u8>); 11] = [
        ("MSS that fits exactly", SYN, options(&[2, 4, 0xbeef], limit)),
        ("small MSS", SYN, options(&[2, 4, 0xbeef], 536)),
        ("MSS 0", SYN, options(&[2, 4, 0xbeef], 0)),
        ("no options", SYN, vec![]),
        ("no MSS", SYN, vec![1, 3, 3, 7]),
        ("end of options before the MSS", SYN, options(&[0, 1, 1, 1, 2, 4, 0xbeef], 1460)),
        ("an option of length 0", SYN, options(&[253, 0, 1, 1, 2, 4, 0xbeef], 1460)),
        ("an option of length 1", SYN, options(&[253, 1, 1, 1, 2, 4, 0xbeef], 1460)),
        ("an option longer than the options", SYN, options(&[253, 99, 1, 1, 2, 4, 0xbeef], 1460)),
        ("thirty-six NOPs", SYN, options(&[&[1; 36][..], &[2, 4, 0xbeef]].concat(), 1460)),
        ("no SYN", ACK, options(&[2, 4, 0xbeef], 1460)),
    ];
    for (name, flags, options) in unchanged {
        let packet = syn(flags, &options);
        all.push((name.to_owned(), packet.clone(), packet));
    }
    all
}

/// Returns SYNs whose options cannot be parsed. Programs must not change them.
pub(crate) fn odd_syns(family: Family) -> Vec<(&'static str, Packet)> {
    let syn = |options: &[u8]| tcp(family, MINE, EDGES, SYN, options);
    let mut all = vec![
        ("header length beyond the packet, MSS cut off", syn(&[2, 4]).doff(15)),
        ("header length beyond the packet, MSS cut in half", syn(&[2, 4, 5]).doff(15)),
        ("header of 16 bytes", syn(&[2, 4, 5, 180]).doff(4)),
        ("header without room for options", syn(&[2, 4, 5, 180]).doff(5)),
        ("an MSS of length 2", syn(&[2, 2, 5, 180])),
        ("an MSS of length 3, then others", syn(&[2, 3, 5, 180, 1, 1, 1, 0])),
        ("an MSS of length 5", syn(&[2, 5, 5, 180, 1, 1, 1, 0])),
        (
            "an MSS that begins in the last two bytes of the options, and data",
            syn(&[1, 1, 2, 4]).data(&[0xff, 0xff, 0xff, 0xff]),
        ),
        (
            "an MSS that begins in the last three bytes of the options, and data",
            syn(&[1, 2, 4, 0xff]).data(&[0xff, 0xff]),
        ),
    ];
    if family == Family::V4 {
        all.push(("a first fragment", syn(&[2, 4, 5, 180]).fragment(0x2000)));
        all.push(("a later fragment", syn(&[2, 4, 5, 180]).fragment(0x0001)));
    }
    all
}

#[test]
fn mss_is_clamped_with_valid_checksums() {
    require_root!();
    let dataplane = Dataplane::load(topology::member());
    let mut cases = Vec::new();
    for family in Family::BOTH {
        let table = syns(family);
        for (name, _, after) in &table {
            assert_sound(&after.bytes(), name);
        }
        cases.extend(table.iter().map(|(name, before, after)| encapsulated(name, before, after)));
        cases.extend(odd_syns(family).iter().map(|(name, packet)| encapsulated(name, packet, packet)));
    }
    let [before, after] = [1460u16, 1380].map(|mss| {
        let options = [[2, 4].as_slice(), &mss.to_be_bytes()].concat();
        tcp(Family::V4, MINE, EDGES, SYN, &options).ip_options(&[1, 1, 1, 0])
    });
    cases.push(encapsulated("MSS behind IP options", &before, &after));
    check(&dataplane, Hook::OverlayEgress, &cases);
}

#[test]
fn fallback_packets_of_gateway_node_pass_unchanged() {
    require_root!();
    let mut cases = Vec::new();
    for family in Family::BOTH {
        let syn = tcp(family, EDGES, MEMBERS, SYN, &[2, 4, 5, 180]);
        cases.extend([
            Case::new(
                format!("{family:?}: already counted where it was redirected"),
                udp(family, EDGES, MEMBERS).overlay_frame(),
            ),
            Case::new(format!("{family:?}: a SYN is unchanged"), syn.overlay_frame()),
            Case::new(format!("{family:?}: to an unknown prefix"), udp(family, EDGES, UNKNOWN).overlay_frame())
                .dropped(NONE, Verdict::DropNoRoute),
            Case::new(format!("{family:?}: from this node to another pool"), udp(family, MINE, EDGES).frame())
                .dropped(EDGE, Verdict::DropNoGateway),
        ]);
    }
    check(&Dataplane::load(topology::gateway()), Hook::OverlayEgress, &cases);
}

#[test]
fn tunnel_key_sends_packets_to_gateway_node_on_devices() {
    require_root!();
    let testbed = Testbed::new(topology::member(), &[Hook::OverlayEgress], 1500);
    let (overlay, lan) = (testbed.overlay_sender(), testbed.on_lan());
    for family in Family::BOTH {
        let datagram = udp(family, MINE, EDGES);
        let [syn, clamped] = [1460, fitting_mss(family)].map(|mss: u16| {
            let options = [[1, 2, 4].as_slice(), &mss.to_be_bytes(), &[1, 1, 0]].concat();
            tcp(family, MINE, EDGES, SYN, &options)
        });
        let packets = [
            ("a datagram", datagram.clone(), datagram.clone()),
            ("DSCP and ECN", datagram.clone().class(0xb9), datagram.clone().class(0xb9)),
            ("of the tunnel's MTU", datagram.clone().len(1420), datagram.clone().len(1420)),
            ("a SYN", syn, clamped),
        ];
        for (name, before, after) in packets {
            let what = format!("{family:?}: {name}");
            let frame = before.frame();
            let counted = testbed.counted(&what, || overlay.send(&frame));
            let expected = [((EDGE, Verdict::Encapsulated), Count { packets: 1, bytes: frame.len() as u64 })];
            assert_eq!(counted, expected.into(), "{what}");
            assert_from_vxlan_device(&lan.next(&what), &what, ME, GATEWAY, &after);
        }
        for len in [1, family.header_len() - 1] {
            let what = format!("{family:?}: {len} bytes");
            let frame = &datagram.frame()[..ETH_LEN + len];
            let counted = testbed.counted(&what, || overlay.send_dropped(frame));
            let expected = [((NONE, Verdict::DropMalformed), Count { packets: 1, bytes: frame.len() as u64 })];
            assert_eq!(counted, expected.into(), "{what}");
        }
        overlay.send(&datagram.frame());
        assert_from_vxlan_device(&lan.next("the first packet"), "the first packet", ME, GATEWAY, &datagram);
    }
}

#[test]
fn link_local_multicast_is_not_counted_as_drop() {
    require_root!();
    // The kernel announces its IPv6 groups on every new device, a random time after it is up. A drop counter would be a
    // false alarm on every node.
    let with = |family: Family, destination: &[u8]| {
        let mut frame = udp(family, MINE, UNKNOWN).frame();
        let end = 14 + family.header_len();
        frame[end - destination.len()..end].copy_from_slice(destination);
        frame
    };
    let mut group = [0; 16];
    (group[0], group[1], group[15]) = (0xff, 0x02, 0x16);
    let mut almost = group;
    almost[0] = 0xfe;
    let cases = [
        Case::new("MLD", with(Family::V6, &group)).dropped(NONE, Verdict::Multicast),
        Case::new("IGMP's group", with(Family::V4, &[224, 0, 0, 22])).dropped(NONE, Verdict::Multicast),
        Case::new("the last group", with(Family::V4, &[239, 255, 255, 255])).dropped(NONE, Verdict::Multicast),
        Case::new("not a group, below the range", with(Family::V4, &[223, 255, 255, 255]))
            .dropped(NONE, Verdict::DropNoRoute),
        Case::new("not a group, above the range", with(Family::V4, &[240, 0, 0, 1]))
            .dropped(NONE, Verdict::DropNoRoute),
        Case::new("not a group", with(Family::V6, &almost)).dropped(NONE, Verdict::DropNoRoute),
    ];
    check(&Dataplane::load(topology::member()), Hook::OverlayEgress, &cases);
}
