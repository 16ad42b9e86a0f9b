//! Tests of `uplink_xdp`, which unwraps packets for the fast tier and drops those from outside the pool.

use raven_agent::bpf::Hook;
use raven_common::{
    Verdict,
    tables::{CONFIG_OUTER6, Config, GatewayId, UNWRAPPED_MAGIC},
};
use raven_tests::require_root;

use crate::{
    case::{Case, check},
    dataplane::Dataplane,
    overlay_egress::neither_tcp_nor_udp,
    packet::{ACK, Family, Overlay, Packet, ethernet, overlay, tcp, udp},
    topology::{
        self, EDGE, EDGES, FAR, FARS, GATEWAY, GATEWAYS, LOST, LOSTS, ME, MEMBER, MEMBERS, MINE, NONE, OUTSIDER,
        TUNNEL_MTU, UNKNOWN,
    },
};

/// Returns the frame that [`MEMBER`] sends to this gateway node.
fn from_member(inner: &Packet) -> Overlay {
    overlay(MEMBER, ME, inner.overlay_frame())
}

/// Expects that the packet is unwrapped with its TTL decremented and gets metadata. The inner frame gets
/// the outer MAC addresses.
fn unwrapped(name: &str, outer: &Overlay, inner: &Packet, gateway: GatewayId) -> Case {
    let metadata = [UNWRAPPED_MAGIC.to_ne_bytes(), gateway.to_ne_bytes()].concat();
    let forwarded = inner.clone().ttl(inner.ttl - 1);
    let frame = ethernet(outer.macs[0], outer.macs[1], inner.family.ethertype(), &forwarded.bytes());
    Case::new(format!("{:?}: {name}", inner.family), outer.frame()).xdp_passes().with_meta(metadata).becomes(frame)
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
            case("to a pool without gateway node, which XDP does not check", &udp(family, MEMBERS, LOSTS), LOST),
            case("with TTL 2", &inner.clone().ttl(2), EDGE),
            case("of the tunnel's MTU", &inner.clone().len(TUNNEL_MTU as usize), EDGE),
            case("of minimum length", &inner.clone().len(family.header_len() + 8), EDGE),
        ]);
        for class in [0x00, 0x01, 0x02, 0xb8] {
            let marked = Overlay { class, ..from_member(&inner.clone().class(0xbb)) };
            cases.push(unwrapped(
                &format!("outer traffic class {class:#x}"),
                &marked,
                &inner.clone().class(0xbb),
                EDGE,
            ));
        }
    }
    cases.extend(
        neither_tcp_nor_udp(MEMBERS, EDGES)
            .iter()
            .map(|(name, inner)| unwrapped(name, &from_member(inner), inner, EDGE)),
    );
    let with_options = udp(Family::V4, MEMBERS, EDGES).ip_options(&[1, 1, 1, 0]);
    cases.push(unwrapped("inner IP options", &from_member(&with_options), &with_options, EDGE));
    check(&Dataplane::load(topology::gateway()), Hook::UplinkXdp, &cases);
}

#[test]
fn padding_behind_inner_packet_is_accepted() {
    require_root!();
    let inner = udp(Family::V4, MEMBERS, EDGES);
    let outer = from_member(&inner);
    let padded = |mut frame: Vec<u8>| {
        frame.extend([0; 7]);
        frame
    };
    let metadata = [UNWRAPPED_MAGIC.to_ne_bytes(), EDGE.to_ne_bytes()].concat();
    let frame = ethernet(outer.macs[0], outer.macs[1], [0x08, 0x00], &inner.clone().ttl(inner.ttl - 1).bytes());
    let case = Case::new("padded", padded(outer.frame())).xdp_passes().with_meta(metadata).becomes(padded(frame));
    check(&Dataplane::load(topology::gateway()), Hook::UplinkXdp, &[case]);
}

#[test]
fn ipv4_is_not_touched_in_a_pool_with_ipv6_only() {
    require_root!();
    let config = Config { flags: topology::gateway().flags | CONFIG_OUTER6, ..topology::gateway() };
    let from = |node: [u8; 4]| overlay(node, ME, udp(Family::V4, MEMBERS, EDGES).overlay_frame()).frame();
    let cases = [("a node's stand-in", MEMBER), ("another address", OUTSIDER)];
    let cases = cases.map(|(name, node)| Case::new(name, from(node)).xdp_passes());
    check(&Dataplane::load(config), Hook::UplinkXdp, &cases);
}

#[test]
fn other_packets_pass_unchanged_and_uncounted() {
    require_root!();
    let mut cases = vec![
        Case::new("ARP", ethernet([0xff; 6], [2; 6], [0x08, 0x06], &[0; 46])).xdp_passes(),
        Case::new("only an Ethernet header", ethernet([2; 6], [2; 6], [0x08, 0x00], &[])).xdp_passes(),
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
            case("the overlay's port as source only", Overlay { ports: [4472, 50_000], ..good() }),
            case("to another address", Overlay { to: GATEWAY, ..good() }),
            case("from outside the pool to another address", Overlay { from: OUTSIDER, to: GATEWAY, ..good() }),
            case("another network identifier", Overlay { vni: 201, ..good() }),
            case("the network identifier in the wrong byte", Overlay { vni: 200 << 8, ..good() }),
            case("no identifier", Overlay { flags: 0, ..good() }),
            case("an unknown VXLAN flag", Overlay { flags: 0x88, ..good() }),
            case("congestion experienced", Overlay { class: 0x03, ..good() }),
            case("congestion experienced, with a code point", Overlay { class: 0xbb, ..good() }),
            case("from a gateway node", overlay(GATEWAY, ME, udp(family, EDGES, MINE).overlay_frame())),
            case("from a gateway node's own pods", overlay(GATEWAY, ME, udp(family, GATEWAYS, EDGES).overlay_frame())),
            case("TTL 1", with(inner.clone().ttl(1))),
            case("TTL 0", with(inner.clone().ttl(0))),
            case("one byte above the tunnel's MTU", with(inner.clone().len(TUNNEL_MTU as usize + 1))),
            case("to an unknown prefix", with(udp(family, MEMBERS, UNKNOWN))),
            case("to this node", with(udp(family, MEMBERS, MINE))),
            case("to the sender's node", with(udp(family, MEMBERS, MEMBERS))),
            Case::new(format!("{family:?}: with a VLAN tag"), vlan).xdp_passes(),
            Case::new(format!("{family:?}: truncated within the UDP ports"), udp_cut).xdp_passes(),
            Case::new(format!("{family:?}: truncated within the VXLAN header"), vxlan_cut).xdp_passes(),
        ]);
    }
    check(&Dataplane::load(topology::gateway()), Hook::UplinkXdp, &cases);
}

#[test]
fn foreign_and_spoofed_packets_are_dropped_and_counted() {
    require_root!();
    let mut cases = Vec::new();
    for family in Family::BOTH {
        let case = |name: &str, frame: Vec<u8>, verdict| {
            Case::new(format!("{family:?}: {name}"), frame).xdp_dropped(NONE, verdict)
        };
        let inner = udp(family, MEMBERS, EDGES);
        let good = from_member(&inner);
        let ip = 14 + 50;
        let edited = |name: &str, edit: &dyn Fn(&mut Vec<u8>)| {
            let mut frame = good.frame();
            edit(&mut frame);
            case(name, frame, Verdict::DropMalformed)
        };
        cases.extend([
            case(
                "from outside the pool",
                Overlay { from: OUTSIDER, ..good.clone() }.frame(),
                Verdict::DropOuterNotInPool,
            ),
            case(
                "from outside the pool, truncated within the VXLAN header",
                Overlay { from: OUTSIDER, ..good.clone() }.frame()[..40].to_vec(),
                Verdict::DropOuterNotInPool,
            ),
            case(
                "from outside the pool, another identifier",
                Overlay { from: OUTSIDER, vni: 1, ..good.clone() }.frame(),
                Verdict::DropOuterNotInPool,
            ),
            case(
                "ARP inside",
                overlay(MEMBER, ME, ethernet([0xff; 6], [2; 6], [0x08, 0x06], &[0; 28])).frame(),
                Verdict::DropNotIp,
            ),
            case(
                "source of this node's pod",
                overlay(MEMBER, ME, udp(family, MINE, EDGES).overlay_frame()).frame(),
                Verdict::DropSpoofedInner,
            ),
            case(
                "source of another node's pod",
                overlay(MEMBER, ME, udp(family, GATEWAYS, EDGES).overlay_frame()).frame(),
                Verdict::DropSpoofedInner,
            ),
            case(
                "source of another pool's pod",
                overlay(MEMBER, ME, udp(family, FARS, EDGES).overlay_frame()).frame(),
                Verdict::DropSpoofedInner,
            ),
            case(
                "unknown source",
                overlay(MEMBER, ME, udp(family, UNKNOWN, EDGES).overlay_frame()).frame(),
                Verdict::DropSpoofedInner,
            ),
            case(
                "unknown source and destination",
                overlay(MEMBER, ME, udp(family, UNKNOWN, UNKNOWN).overlay_frame()).frame(),
                Verdict::DropSpoofedInner,
            ),
            edited("no inner packet", &|f| f.truncate(14 + 36)),
            edited("truncated inner Ethernet header", &|f| f.truncate(ip - 1)),
            edited("truncated inner IP header", &|f| f.truncate(ip + family.header_len() - 1)),
            edited("last byte missing", &|f| f.truncate(f.len() - 1)),
            edited("version 5", &|f| f[ip] = 0x50 | f[ip] & 0xf),
            edited("version of the other family", &|f| f[ip] = if family == Family::V4 { 0x65 } else { 0x40 }),
        ]);
        match family {
            Family::V4 => cases.extend([
                edited("inner header of 16 bytes", &|f| f[ip] = 0x44),
                edited("shorter than its header", &|f| f[ip + 2..ip + 4].copy_from_slice(&[0, 19])),
                edited("length field 65,535", &|f| f[ip + 2..ip + 4].copy_from_slice(&[0xff, 0xff])),
            ]),
            Family::V6 => {
                cases.push(edited("length of 65,575 bytes", &|f| f[ip + 4..ip + 6].copy_from_slice(&[0xff, 0xff])));
            }
        }
    }
    check(&Dataplane::load(topology::gateway()), Hook::UplinkXdp, &cases);
}

#[test]
fn node_without_tunnel_passes_everything() {
    require_root!();
    let mut cases = Vec::new();
    for family in Family::BOTH {
        let inner = udp(family, MEMBERS, EDGES);
        cases.extend([
            Case::new(format!("{family:?}: from a node of the pool"), from_member(&inner).frame()).xdp_passes(),
            Case::new(
                format!("{family:?}: from outside the pool"),
                overlay(OUTSIDER, ME, inner.overlay_frame()).frame(),
            )
            .xdp_passes(),
        ]);
    }
    check(&Dataplane::load(topology::member()), Hook::UplinkXdp, &cases);
}

#[test]
fn path_cache_is_per_sender_and_generation() {
    require_root!();
    for family in Family::BOTH {
        let mut dataplane = Dataplane::load(topology::gateway());
        let inner = udp(family, MEMBERS, EDGES);
        let good = || unwrapped("a cached path", &from_member(&inner), &inner, EDGE);
        let elsewhere = udp(family, MEMBERS, FARS);
        let cases = [
            good(),
            good(),
            // The same inner addresses from outside the pool and from another node: the cached entry of the
            // member does not apply.
            Case::new("from outside the pool", Overlay { from: OUTSIDER, ..from_member(&inner) }.frame())
                .xdp_dropped(NONE, Verdict::DropOuterNotInPool),
            Case::new("from this node", Overlay { from: ME, ..from_member(&inner) }.frame())
                .xdp_dropped(NONE, Verdict::DropSpoofedInner),
            unwrapped("another destination", &from_member(&elsewhere), &elsewhere, FAR),
            Case::new("TTL 1", from_member(&inner.clone().ttl(1)).frame()).xdp_passes(),
            Case::new("above the tunnel's MTU", from_member(&inner.clone().len(TUNNEL_MTU as usize + 1)).frame())
                .xdp_passes(),
            good(),
        ];
        check(&dataplane, Hook::UplinkXdp, &cases);

        // The prefix moves to another Gateway and is then removed. Each time, the agent increments the generation.
        dataplane.remote(EDGES, Some(FAR));
        dataplane.configure(Config { generation: 2, ..topology::gateway() });
        check(&dataplane, Hook::UplinkXdp, &[unwrapped("moved", &from_member(&inner), &inner, FAR)]);
        dataplane.remote(EDGES, None);
        dataplane.configure(Config { generation: 3, ..topology::gateway() });
        check(&dataplane, Hook::UplinkXdp, &[Case::new("removed", from_member(&inner).frame()).xdp_passes()]);
    }
}

#[test]
fn nothing_is_unwrapped_in_a_pool_with_encryption() {
    require_root!();
    let mut cases = Vec::new();
    for family in Family::BOTH {
        let frame = |outer| overlay(outer, ME, udp(family, MEMBERS, EDGES).overlay_frame()).frame();
        cases.extend([
            Case::new(format!("{family:?}: from a member"), frame(MEMBER)).xdp_passes(),
            Case::new(format!("{family:?}: from outside the pool"), frame(OUTSIDER))
                .xdp_dropped(NONE, Verdict::DropOuterNotInPool),
        ]);
    }
    check(&Dataplane::load(topology::encrypted()), Hook::UplinkXdp, &cases);
}
