//! `uplink_xdp`: the fast way into the tunnel begins here, and strangers end here.

use raven_agent::bpf::Hook;
use raven_common::{
    Verdict,
    tables::{Config, GatewayId, UNWRAPPED_MAGIC},
};
use raven_tests::require_root;

use crate::{
    case::{Case, check},
    dataplane::Dataplane,
    overlay_egress::neither_tcp_nor_udp,
    packet::{ACK, Family, Overlay, Packet, ethernet, overlay, tcp, udp},
    world::{self, EDGE, EDGES, FAR, FARS, GATEWAY, GATEWAYS, LOST, LOSTS, ME, MEMBER, MEMBERS, MINE, NOBODYS, NONE, STRANGER, TUNNEL_MTU},
};

/// What [`MEMBER`] sends to this gateway node.
fn from_member(inner: &Packet) -> Overlay {
    overlay(MEMBER, ME, inner.overlay_frame())
}

/// Loses its outer header and a hop, and gets a note; the inner frame is for the addresses that the outer one was for.
fn unwrapped(name: &str, outer: &Overlay, inner: &Packet, gateway: GatewayId) -> Case {
    let note = [UNWRAPPED_MAGIC.to_ne_bytes(), gateway.to_ne_bytes()].concat();
    let forwarded = inner.clone().ttl(inner.ttl - 1);
    let frame = ethernet(outer.macs[0], outer.macs[1], inner.family.ethertype(), &forwarded.bytes());
    Case::new(format!("{:?}: {name}", inner.family), outer.frame()).xdp_passes().with_meta(note).becomes(frame)
}

#[test]
fn packets_for_another_pool_are_unwrapped() {
    require_root!();
    let mut cases = Vec::new();
    for family in Family::BOTH {
        let case = |name: &str, inner: &Packet, gateway| unwrapped(name, &from_member(inner), inner, gateway);
        let inner = udp(family, MEMBERS, EDGES);
        cases.extend([
            case("a datagram", &inner, EDGE),
            case("a segment", &tcp(family, MEMBERS, EDGES, ACK, &[]).data(b"odd"), EDGE),
            case("to a third pool", &udp(family, MEMBERS, FARS), FAR),
            case("to a pool without a way: XDP does not ask", &udp(family, MEMBERS, LOSTS), LOST),
            case("with a hop left", &inner.clone().ttl(2), EDGE),
            case("as long as the tunnel takes", &inner.clone().len(TUNNEL_MTU as usize), EDGE),
            case("as short as can be", &inner.clone().len(family.header_len() + 8), EDGE),
        ]);
        for class in [0x00, 0x01, 0x02, 0xb8] {
            let marked = Overlay { class, ..from_member(&inner.clone().class(0xbb)) };
            cases.push(unwrapped(&format!("outer traffic class {class:#x}"), &marked, &inner.clone().class(0xbb), EDGE));
        }
    }
    cases.extend(neither_tcp_nor_udp(MEMBERS, EDGES).iter().map(|(name, inner)| unwrapped(name, &from_member(inner), inner, EDGE)));
    let with_options = udp(Family::V4, MEMBERS, EDGES).ip_options(&[1, 1, 1, 0]);
    cases.push(unwrapped("inner IP options", &from_member(&with_options), &with_options, EDGE));
    check(&Dataplane::load(world::gateway()), Hook::UplinkXdp, &cases);
}

#[test]
fn padding_behind_the_inner_packet_is_no_reason_to_drop() {
    require_root!();
    let inner = udp(Family::V4, MEMBERS, EDGES);
    let outer = from_member(&inner);
    let padded = |mut frame: Vec<u8>| {
        frame.extend([0; 7]);
        frame
    };
    let note = [UNWRAPPED_MAGIC.to_ne_bytes(), EDGE.to_ne_bytes()].concat();
    let frame = ethernet(outer.macs[0], outer.macs[1], [0x08, 0x00], &inner.clone().ttl(inner.ttl - 1).bytes());
    let case = Case::new("padded", padded(outer.frame())).xdp_passes().with_meta(note).becomes(padded(frame));
    check(&Dataplane::load(world::gateway()), Hook::UplinkXdp, &[case]);
}

#[test]
fn everything_else_passes_untouched_and_uncounted() {
    require_root!();
    let mut cases = vec![
        Case::new("ARP", ethernet([0xff; 6], [2; 6], [0x08, 0x06], &[0; 46])).xdp_passes(),
        Case::new("an Ethernet header and nothing else", ethernet([2; 6], [2; 6], [0x08, 0x00], &[])).xdp_passes(),
        Case::new("half an IPv4 header", ethernet([2; 6], [2; 6], [0x08, 0x00], &[0x45; 10])).xdp_passes(),
        Case::new("plain IPv6", udp(Family::V6, MEMBERS, EDGES).frame()).xdp_passes(),
        Case::new("plain IPv4", udp(Family::V4, MEMBERS, EDGES).frame()).xdp_passes(),
    ];
    for family in Family::BOTH {
        let case = |name: &str, outer: Overlay| Case::new(format!("{family:?}: {name}"), outer.frame()).xdp_passes();
        let inner = udp(family, MEMBERS, EDGES);
        let good = || from_member(&inner);
        let with = |inner: Packet| from_member(&inner);
        let vlan = {
            let f = good().frame();
            [&f[..12], &[0x81, 0x00, 0x00, 0x05], &f[12..]].concat()
        };
        let udp_cut = good().frame()[..14 + 20 + 3].to_vec();
        let vxlan_cut = good().frame()[..14 + 20 + 8 + 7].to_vec();
        cases.extend([
            case("outer IP options", Overlay { ip_options: vec![1, 1, 1, 0], ..good() }),
            case("outer first fragment", Overlay { fragment: 0x2000, ..good() }),
            case("outer last fragment", Overlay { fragment: 0x00b9, ..good() }),
            case("another protocol", Overlay { protocol: 6, ..good() }),
            case("another port", Overlay { ports: [50_000, 4789], ..good() }),
            case("our port as the source only", Overlay { ports: [4472, 50_000], ..good() }),
            case("for another address", Overlay { to: GATEWAY, ..good() }),
            case("a stranger for another address", Overlay { from: STRANGER, to: GATEWAY, ..good() }),
            case("another network identifier", Overlay { vni: 201, ..good() }),
            case("our identifier in the wrong byte", Overlay { vni: 200 << 8, ..good() }),
            case("no identifier", Overlay { flags: 0, ..good() }),
            case("an unknown VXLAN flag", Overlay { flags: 0x88, ..good() }),
            case("congestion experienced", Overlay { class: 0x03, ..good() }),
            case("congestion experienced, with a code point", Overlay { class: 0xbb, ..good() }),
            case("from a gateway node", overlay(GATEWAY, ME, udp(family, EDGES, MINE).overlay_frame())),
            case("from a gateway node, of its own pods", overlay(GATEWAY, ME, udp(family, GATEWAYS, EDGES).overlay_frame())),
            case("hops spent", with(inner.clone().ttl(1))),
            case("hops overspent", with(inner.clone().ttl(0))),
            case("one byte longer than the tunnel takes", with(inner.clone().len(TUNNEL_MTU as usize + 1))),
            case("to nobody", with(udp(family, MEMBERS, NOBODYS))),
            case("to this node", with(udp(family, MEMBERS, MINE))),
            case("to its own node", with(udp(family, MEMBERS, MEMBERS))),
            Case::new(format!("{family:?}: with a VLAN tag"), vlan).xdp_passes(),
            Case::new(format!("{family:?}: cut within UDP's ports"), udp_cut).xdp_passes(),
            Case::new(format!("{family:?}: cut within VXLAN"), vxlan_cut).xdp_passes(),
        ]);
    }
    check(&Dataplane::load(world::gateway()), Hook::UplinkXdp, &cases);
}

#[test]
fn strangers_and_liars_are_dropped_and_counted() {
    require_root!();
    let mut cases = Vec::new();
    for family in Family::BOTH {
        let case = |name: &str, frame: Vec<u8>, verdict| Case::new(format!("{family:?}: {name}"), frame).xdp_dropped(NONE, verdict);
        let inner = udp(family, MEMBERS, EDGES);
        let good = from_member(&inner);
        let ip = 14 + 50;
        let edited = |name: &str, edit: &dyn Fn(&mut Vec<u8>)| {
            let mut frame = good.frame();
            edit(&mut frame);
            case(name, frame, Verdict::DropMalformed)
        };
        cases.extend([
            case("from a stranger", Overlay { from: STRANGER, ..good.clone() }.frame(), Verdict::DropOuterNotInPool),
            case(
                "from a stranger, cut within VXLAN",
                Overlay { from: STRANGER, ..good.clone() }.frame()[..40].to_vec(),
                Verdict::DropOuterNotInPool,
            ),
            case(
                "from a stranger, another identifier",
                Overlay { from: STRANGER, vni: 1, ..good.clone() }.frame(),
                Verdict::DropOuterNotInPool,
            ),
            case("ARP inside", overlay(MEMBER, ME, ethernet([0xff; 6], [2; 6], [0x08, 0x06], &[0; 28])).frame(), Verdict::DropNotIp),
            case(
                "the pods of this node as its own",
                overlay(MEMBER, ME, udp(family, MINE, EDGES).overlay_frame()).frame(),
                Verdict::DropSpoofedInner,
            ),
            case(
                "another node's pods as its own",
                overlay(MEMBER, ME, udp(family, GATEWAYS, EDGES).overlay_frame()).frame(),
                Verdict::DropSpoofedInner,
            ),
            case(
                "another pool's pods as its own",
                overlay(MEMBER, ME, udp(family, FARS, EDGES).overlay_frame()).frame(),
                Verdict::DropSpoofedInner,
            ),
            case(
                "nobody's pods as its own",
                overlay(MEMBER, ME, udp(family, NOBODYS, EDGES).overlay_frame()).frame(),
                Verdict::DropSpoofedInner,
            ),
            case(
                "nobody's pods to nobody",
                overlay(MEMBER, ME, udp(family, NOBODYS, NOBODYS).overlay_frame()).frame(),
                Verdict::DropSpoofedInner,
            ),
            edited("nothing inside", &|f| f.truncate(14 + 36)),
            edited("inner Ethernet header cut", &|f| f.truncate(ip - 1)),
            edited("inner IP header cut", &|f| f.truncate(ip + family.header_len() - 1)),
            edited("last byte missing", &|f| f.truncate(f.len() - 1)),
            edited("version 5", &|f| f[ip] = 0x50 | f[ip] & 0xf),
            edited("version of the other family", &|f| f[ip] = if family == Family::V4 { 0x65 } else { 0x40 }),
        ]);
        match family {
            Family::V4 => cases.extend([
                edited("inner header of 16 bytes", &|f| f[ip] = 0x44),
                edited("shorter than its header", &|f| f[ip + 2..ip + 4].copy_from_slice(&[0, 19])),
                edited("of 65,535 bytes, it says", &|f| f[ip + 2..ip + 4].copy_from_slice(&[0xff, 0xff])),
            ]),
            Family::V6 => cases.push(edited("of 65,575 bytes, it says", &|f| f[ip + 4..ip + 6].copy_from_slice(&[0xff, 0xff]))),
        }
    }
    check(&Dataplane::load(world::gateway()), Hook::UplinkXdp, &cases);
}

#[test]
fn a_node_without_a_tunnel_leaves_everything_alone() {
    require_root!();
    let mut cases = Vec::new();
    for family in Family::BOTH {
        let inner = udp(family, MEMBERS, EDGES);
        cases.extend([
            Case::new(format!("{family:?}: from a node"), from_member(&inner).frame()).xdp_passes(),
            Case::new(format!("{family:?}: from a stranger"), overlay(STRANGER, ME, inner.overlay_frame()).frame()).xdp_passes(),
        ]);
    }
    check(&Dataplane::load(world::ordinary()), Hook::UplinkXdp, &cases);
}

#[test]
fn what_is_remembered_is_remembered_of_one_sender_and_until_the_tables_change() {
    require_root!();
    for family in Family::BOTH {
        let mut dataplane = Dataplane::load(world::gateway());
        let inner = udp(family, MEMBERS, EDGES);
        let good = || unwrapped("a packet that is remembered", &from_member(&inner), &inner, EDGE);
        let elsewhere = udp(family, MEMBERS, FARS);
        let cases = [
            good(),
            good(),
            // The same addresses from a stranger, and from another node of the pool: nobody else's memory helps them.
            Case::new("a stranger", Overlay { from: STRANGER, ..from_member(&inner) }.frame())
                .xdp_dropped(NONE, Verdict::DropOuterNotInPool),
            Case::new("this node itself", Overlay { from: ME, ..from_member(&inner) }.frame()).xdp_dropped(NONE, Verdict::DropSpoofedInner),
            unwrapped("another destination", &from_member(&elsewhere), &elsewhere, FAR),
            Case::new("hops spent", from_member(&inner.clone().ttl(1)).frame()).xdp_passes(),
            Case::new("too long", from_member(&inner.clone().len(TUNNEL_MTU as usize + 1)).frame()).xdp_passes(),
            good(),
        ];
        check(&dataplane, Hook::UplinkXdp, &cases);

        // The prefix moves to another Gateway, then away; each time the agent moves the generation on.
        dataplane.remote(EDGES, Some(FAR));
        dataplane.configure(Config { generation: 2, ..world::gateway() });
        check(&dataplane, Hook::UplinkXdp, &[unwrapped("moved", &from_member(&inner), &inner, FAR)]);
        dataplane.remote(EDGES, None);
        dataplane.configure(Config { generation: 3, ..world::gateway() });
        check(&dataplane, Hook::UplinkXdp, &[Case::new("nobody has it", from_member(&inner).frame()).xdp_passes()]);
    }
}
