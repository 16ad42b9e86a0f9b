//! Tests of `overlay_ingress`: which sender may send which packet. The program depends on tunnel metadata, which only a
//! VXLAN device creates; so the tests send overlay frames from the LAN through a real `raven0`.

use raven_agent::bpf::Hook;
use raven_common::{
    Verdict,
    tables::{CONFIG_OUTER6, CONFIG_TUNNEL_REDIRECT, Config, Count, GatewayId},
};
use raven_tests::require_root;

use crate::{
    case::{Case, check},
    dataplane::Dataplane,
    packet::{ACK, Family, Overlay, Packet, ethernet, overlay, sent_by, tcp, udp},
    testbed::{Port, Sender, Testbed},
    topology::{
        self, EDGE, EDGES, FAR, FARS, GATEWAY, GATEWAYS, KUBELET, ME, MEMBER, MEMBERS, MINE, NONE, OUTSIDER,
        TUNNEL_MTU, UNKNOWN,
    },
};

#[test]
fn packets_without_tunnel_metadata_are_dropped() {
    require_root!();
    let mut cases = Vec::new();
    for family in Family::BOTH {
        let packet = udp(family, MEMBERS, EDGES).overlay_frame();
        cases.push(Case::new(format!("{family:?}"), packet).dropped(NONE, Verdict::DropNoTunnelKey));
    }
    check(&Dataplane::load(topology::gateway()), Hook::OverlayIngress, &cases);
}

/// A node under test with a sender on its LAN.
struct Node {
    testbed: Testbed,
    lan: Sender,
}

impl Node {
    fn new(config: Config) -> Self {
        let testbed = Testbed::new(config, &[Hook::OverlayIngress], 1700);
        let lan = testbed.lan_sender();
        Self { testbed, lan }
    }

    /// Sends a frame from the LAN and compares the counters: one packet with the inner frame's bytes.
    fn check(&self, what: &str, outer: &Overlay, gateway: GatewayId, verdict: Verdict) {
        let counted = self.testbed.counted(what, || self.lan.send(&outer.frame()));
        let expected = [((gateway, verdict), Count { packets: 1, bytes: outer.inner.len() as u64 })];
        assert_eq!(counted, expected.into(), "{what}");
    }

    /// Like [`Node::check`], for packets that enter the tunnel: the TTL is decremented, and nothing else changes.
    fn check_redirected(&self, tunnel: &Port, what: &str, outer: &Overlay, inner: &Packet, gateway: GatewayId) {
        self.check(what, outer, gateway, Verdict::ToTunnel);
        tunnel.expect(what, &inner.clone().ttl(inner.ttl - 1).bytes());
    }
}

fn from_member(inner: &Packet) -> Overlay {
    overlay(MEMBER, ME, inner.overlay_frame())
}

#[test]
fn gateway_node_redirects_members_packets_into_tunnel() {
    require_root!();
    let node = Node::new(topology::gateway());
    let tunnel = node.testbed.on_node("raven-wg0");
    for family in Family::BOTH {
        let inner = udp(family, MEMBERS, EDGES);
        let packets: [(&str, Packet, GatewayId); 6] = [
            ("a datagram", inner.clone(), EDGE),
            ("a segment", tcp(family, MEMBERS, EDGES, ACK, &[]).data(b"odd"), EDGE),
            (
                "a SYN, whose MSS was clamped on the sender's node",
                tcp(family, MEMBERS, EDGES, crate::packet::SYN, &[2, 4, 5, 180]),
                EDGE,
            ),
            ("to a third pool", udp(family, MEMBERS, FARS), FAR),
            ("with TTL 2", inner.clone().ttl(2), EDGE),
            ("of the tunnel's MTU", inner.clone().class(0xb9).len(TUNNEL_MTU as usize), EDGE),
        ];
        for (name, packet, gateway) in &packets {
            node.check_redirected(&tunnel, &format!("{family:?}: {name}"), &from_member(packet), packet, *gateway);
        }
        // Packets that the fast tier leaves to this one. Here the kernel has merged the ECN marks (RFC 6040).
        let marked = Overlay { class: 0x03, ..from_member(&inner.clone().class(0x02)) };
        node.check_redirected(
            &tunnel,
            &format!("{family:?}: congestion experienced"),
            &marked,
            &inner.clone().class(0x03),
            EDGE,
        );
        let with_options = Overlay { ip_options: vec![1, 1, 1, 0], ..from_member(&inner) };
        node.check_redirected(&tunnel, &format!("{family:?}: outer IP options"), &with_options, &inner, EDGE);
        let own = overlay(GATEWAY, ME, udp(family, GATEWAYS, EDGES).overlay_frame());
        node.check_redirected(
            &tunnel,
            &format!("{family:?}: from pods of another gateway node"),
            &own,
            &udp(family, GATEWAYS, EDGES),
            EDGE,
        );
    }
}

#[test]
fn gateway_node_passes_or_drops_other_packets() {
    require_root!();
    let node = Node::new(topology::gateway());
    let tunnel = node.testbed.on_node("raven-wg0");
    let arp = ethernet([0xff; 6], [2; 6], [0x08, 0x06], &[0; 28]);
    node.check("ARP inside", &overlay(MEMBER, ME, arp), NONE, Verdict::DropNotIp);
    for family in Family::BOTH {
        let inner = udp(family, MEMBERS, EDGES);
        let from = |outer: [u8; 4], inner: Packet| overlay(outer, ME, inner.overlay_frame());
        let good = from_member(&inner);
        let table = [
            ("another identifier", Overlay { vni: 201, ..good.clone() }, NONE, Verdict::DropWrongVni),
            ("identifier 0", Overlay { vni: 0, ..good.clone() }, NONE, Verdict::DropWrongVni),
            ("from outside the pool", from(OUTSIDER, inner.clone()), NONE, Verdict::DropOuterNotInPool),
            (
                "from outside the pool, source of another pool",
                from(OUTSIDER, udp(family, EDGES, MINE)),
                NONE,
                Verdict::DropOuterNotInPool,
            ),
            (
                "from a member, source of this node's pod",
                from(MEMBER, udp(family, MINE, EDGES)),
                NONE,
                Verdict::DropSpoofedInner,
            ),
            (
                "from a member, source of another node's pod",
                from(MEMBER, udp(family, GATEWAYS, EDGES)),
                NONE,
                Verdict::DropSpoofedInner,
            ),
            (
                "from a gateway node, source of another node's pod",
                from(GATEWAY, inner.clone()),
                NONE,
                Verdict::DropSpoofedInner,
            ),
            (
                "from a member, unknown source",
                from(MEMBER, udp(family, UNKNOWN, EDGES)),
                NONE,
                Verdict::DropSpoofedInner,
            ),
            (
                "from a gateway node, unknown source",
                from(GATEWAY, udp(family, UNKNOWN, MINE)),
                NONE,
                Verdict::DropSpoofedInner,
            ),
            (
                "from a member, source of another pool",
                from(MEMBER, udp(family, EDGES, MINE)),
                EDGE,
                Verdict::DropNotFromGateway,
            ),
            (
                "from another pool to another node",
                from(GATEWAY, udp(family, EDGES, MEMBERS)),
                EDGE,
                Verdict::DropNoRoute,
            ),
            ("from another pool to a third pool", from(GATEWAY, udp(family, EDGES, FARS)), EDGE, Verdict::DropNoRoute),
            ("from another pool to this node", from(GATEWAY, udp(family, EDGES, MINE)), EDGE, Verdict::Delivered),
            ("to an unknown prefix", from(MEMBER, udp(family, MEMBERS, UNKNOWN)), NONE, Verdict::StackNotRemote),
            ("to this node", from(MEMBER, udp(family, MEMBERS, MINE)), NONE, Verdict::StackNotRemote),
            ("TTL 1", from(MEMBER, inner.clone().ttl(1)), EDGE, Verdict::StackTtl),
            ("TTL 0", from(MEMBER, inner.clone().ttl(0)), EDGE, Verdict::StackTtl),
            (
                "one byte above the tunnel's MTU",
                from(MEMBER, inner.clone().len(TUNNEL_MTU as usize + 1)),
                EDGE,
                Verdict::StackTooBig,
            ),
        ];
        for (name, outer, gateway, verdict) in &table {
            node.check(&format!("{family:?}: {name}"), outer, *gateway, *verdict);
        }
        for (name, outer) in malformed(&good, family) {
            node.check(&format!("{family:?}: {name}"), &outer, NONE, Verdict::DropMalformed);
        }
        // The next frame in the tunnel is a valid one, so none of the above entered it.
        node.check_redirected(&tunnel, &format!("{family:?}: a valid packet"), &good, &inner, EDGE);
    }
}

/// Returns frames with inconsistent inner headers. Truncated ones are dropped by the VXLAN device of newer kernels.
fn malformed(good: &Overlay, family: Family) -> Vec<(&'static str, Overlay)> {
    let edited = |name, edit: &dyn Fn(&mut Vec<u8>)| {
        let mut outer = good.clone();
        edit(&mut outer.inner);
        (name, outer)
    };
    let mut all = vec![
        edited("last byte missing", &|f| f.truncate(f.len() - 1)),
        edited("version 5", &|f| f[14] = 0x50 | f[14] & 0xf),
    ];
    if family == Family::V4 {
        all.push(edited("header of 16 bytes", &|f| f[14] = 0x44));
        all.push(edited("shorter than its header", &|f| f[16..18].copy_from_slice(&[0, 19])));
    }
    all
}

#[test]
fn pool_with_ipv6_only_accepts_no_outer_ipv4() {
    require_root!();
    let node = Node::new(Config { flags: topology::gateway().flags | CONFIG_OUTER6, ..topology::gateway() });
    for family in Family::BOTH {
        // A node's stand-in in the maps looks like this source.
        let packet = from_member(&udp(family, MEMBERS, EDGES));
        node.check(&format!("{family:?}"), &packet, NONE, Verdict::DropNoTunnelKey);
    }
}

#[test]
fn packets_pass_to_stack_without_redirect_support() {
    require_root!();
    let node = Node::new(Config { flags: topology::gateway().flags & !CONFIG_TUNNEL_REDIRECT, ..topology::gateway() });
    for family in Family::BOTH {
        let inner = udp(family, MEMBERS, EDGES);
        node.check(&format!("{family:?}: valid"), &from_member(&inner), EDGE, Verdict::StackNoRedirect);
        node.check(&format!("{family:?}: TTL 1"), &from_member(&inner.clone().ttl(1)), EDGE, Verdict::StackTtl);
        node.check(
            &format!("{family:?}: spoofed"),
            &from_member(&udp(family, MINE, EDGES)),
            NONE,
            Verdict::DropSpoofedInner,
        );
    }
}

#[test]
fn member_accepts_packets_from_gateway_nodes_only() {
    require_root!();
    let node = Node::new(topology::member());
    for family in Family::BOTH {
        let check = |name: &str, outer: [u8; 4], inner: Packet, gateway: GatewayId, verdict: Verdict| {
            node.check(&format!("{family:?}: {name}"), &overlay(outer, ME, inner.overlay_frame()), gateway, verdict);
        };
        check("from a gateway node", GATEWAY, udp(family, EDGES, MINE), EDGE, Verdict::Delivered);
        check("from a third pool", GATEWAY, udp(family, FARS, MINE), FAR, Verdict::Delivered);
        check("with TTL 1", GATEWAY, udp(family, EDGES, MINE).ttl(1), EDGE, Verdict::Delivered);
        check("to another node", GATEWAY, udp(family, EDGES, MEMBERS), EDGE, Verdict::DropNoRoute);
        check("to an unknown prefix", GATEWAY, udp(family, EDGES, UNKNOWN), EDGE, Verdict::DropNoRoute);
        check("from a member", MEMBER, udp(family, EDGES, MINE), EDGE, Verdict::DropNotFromGateway);
        check("from outside the pool", OUTSIDER, udp(family, EDGES, MINE), NONE, Verdict::DropOuterNotInPool);
        check(
            "from a member's pod, for gateway nodes only",
            MEMBER,
            udp(family, MEMBERS, EDGES),
            NONE,
            Verdict::DropNotFromGateway,
        );
        check("from a gateway node's pod", GATEWAY, udp(family, GATEWAYS, MINE), NONE, Verdict::DropNotFromGateway);
        check("spoofed", GATEWAY, udp(family, MEMBERS, MINE), NONE, Verdict::DropSpoofedInner);
    }
}

#[test]
fn kubelet_connections_pass_to_proxy_with_and_without_tunnel() {
    require_root!();
    for (config, otherwise) in [
        (topology::gateway(), Verdict::StackNotRemote),
        (topology::encrypted(), Verdict::DropNotEncrypted),
        (topology::member(), Verdict::DropNotFromGateway),
    ] {
        let node = Node::new(config);
        let inner = |packet: Packet| packet.overlay_frame();
        let from_node = |source: [u8; 4], packet: &Packet| sent_by(packet.overlay_frame(), source);
        for family in Family::BOTH {
            let segment = tcp(family, MEMBERS, KUBELET, ACK, &[]);
            let mut table = vec![
                ("from a member's pod", MEMBER, inner(segment.clone()), Verdict::ToProxy),
                ("from the member's own address", MEMBER, from_node(MEMBER, &segment), Verdict::ToProxy),
                (
                    "from a member with another node's address",
                    MEMBER,
                    from_node(GATEWAY, &segment),
                    Verdict::DropSpoofedInner,
                ),
                ("from a member with this node's address", MEMBER, from_node(ME, &segment), Verdict::DropSpoofedInner),
                (
                    "from a member, source of another node's pod",
                    MEMBER,
                    inner(tcp(family, GATEWAYS, KUBELET, ACK, &[])),
                    Verdict::DropSpoofedInner,
                ),
                ("from outside the pool", OUTSIDER, inner(segment.clone()), Verdict::DropOuterNotInPool),
                ("not TCP", MEMBER, inner(udp(family, MEMBERS, KUBELET)), otherwise),
                ("to an unknown prefix", MEMBER, inner(tcp(family, MEMBERS, UNKNOWN, ACK, &[])), otherwise),
                (
                    "from the member's own address to an unknown prefix",
                    MEMBER,
                    from_node(MEMBER, &tcp(family, MEMBERS, UNKNOWN, ACK, &[])),
                    Verdict::DropSpoofedInner,
                ),
            ];
            if family == Family::V4 {
                table.push(("a fragment without a port", MEMBER, inner(segment.clone().fragment(1)), otherwise));
            }
            for (name, outer, frame, verdict) in table {
                node.check(&format!("{family:?}: {name} ({otherwise:?})"), &overlay(outer, ME, frame), NONE, verdict);
            }
        }
    }
}

#[test]
fn packets_of_other_pools_are_dropped_in_a_pool_with_encryption() {
    require_root!();
    let without_tunnel = Config { tunnel_ifindex: 0, ..topology::encrypted() };
    for (config, what) in [(topology::encrypted(), "with a tunnel"), (without_tunnel, "without a tunnel")] {
        let node = Node::new(config);
        for family in Family::BOTH {
            let check = |outer, inner: Packet, gateway| {
                let frame = overlay(outer, ME, inner.overlay_frame());
                node.check(&format!("{family:?}: {what}"), &frame, gateway, Verdict::DropNotEncrypted);
            };
            check(MEMBER, udp(family, MEMBERS, EDGES), NONE);
            check(GATEWAY, udp(family, EDGES, MINE), EDGE);
        }
    }
}
