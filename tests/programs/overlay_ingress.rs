//! `overlay_ingress`: who sent this, and may they? All that it asks is in the tunnel metadata, which only a VXLAN device
//! makes: so overlay frames come from the LAN, byte by byte, through a real `raven0`.

use raven_agent::bpf::Hook;
use raven_common::{
    Verdict,
    tables::{CONFIG_TUNNEL_REDIRECT, Config, Count, GatewayId},
};
use raven_tests::require_root;

use crate::{
    case::{Case, check},
    dataplane::Dataplane,
    packet::{ACK, Family, Overlay, Packet, ethernet, overlay, sent_by, tcp, udp},
    wire::{Port, Sender, Wire},
    world::{self, EDGE, EDGES, FAR, FARS, GATEWAY, GATEWAYS, KUBELET, ME, MEMBER, MEMBERS, MINE, NOBODYS, NONE, STRANGER, TUNNEL_MTU},
};

#[test]
fn packets_without_tunnel_metadata_are_dropped() {
    require_root!();
    let mut cases = Vec::new();
    for family in Family::BOTH {
        let packet = udp(family, MEMBERS, EDGES).overlay_frame();
        cases.push(Case::new(format!("{family:?}"), packet).dropped(NONE, Verdict::DropNoTunnelKey));
    }
    check(&Dataplane::load(world::gateway()), Hook::OverlayIngress, &cases);
}

/// A node, and what it is sent.
struct Node {
    wire: Wire,
    lan: Sender,
}

impl Node {
    fn new(config: Config) -> Self {
        let wire = Wire::new(config, &[Hook::OverlayIngress], 1700);
        let lan = wire.lan_sender();
        Self { wire, lan }
    }

    /// Sends a frame from the LAN and compares what is counted: one packet, the inner frame's bytes.
    fn check(&self, what: &str, outer: &Overlay, gateway: GatewayId, verdict: Verdict) {
        let counted = self.wire.counted(what, || self.lan.send(&outer.frame()));
        let expected = [((gateway, verdict), Count { packets: 1, bytes: outer.inner.len() as u64 })];
        assert_eq!(counted, expected.into(), "{what}");
    }

    /// The same for what goes into the tunnel: there one hop is missing, and nothing else.
    fn check_redirected(&self, tunnel: &Port, what: &str, outer: &Overlay, inner: &Packet, gateway: GatewayId) {
        self.check(what, outer, gateway, Verdict::ToTunnel);
        tunnel.expect(what, &inner.clone().ttl(inner.ttl - 1).bytes());
    }
}

fn from_member(inner: &Packet) -> Overlay {
    overlay(MEMBER, ME, inner.overlay_frame())
}

#[test]
fn on_a_gateway_node_members_packets_go_into_the_tunnel() {
    require_root!();
    let node = Node::new(world::gateway());
    let tunnel = node.wire.on_node("raven-wg0");
    for family in Family::BOTH {
        let inner = udp(family, MEMBERS, EDGES);
        let packets: [(&str, Packet, GatewayId); 6] = [
            ("a datagram", inner.clone(), EDGE),
            ("a segment", tcp(family, MEMBERS, EDGES, ACK, &[]).data(b"odd"), EDGE),
            ("a SYN, whose MSS was seen to where it came from", tcp(family, MEMBERS, EDGES, crate::packet::SYN, &[2, 4, 5, 180]), EDGE),
            ("to a third pool", udp(family, MEMBERS, FARS), FAR),
            ("with a hop left", inner.clone().ttl(2), EDGE),
            ("as long as the tunnel takes", inner.clone().class(0xb9).len(TUNNEL_MTU as usize), EDGE),
        ];
        for (name, packet, gateway) in &packets {
            node.check_redirected(&tunnel, &format!("{family:?}: {name}"), &from_member(packet), packet, *gateway);
        }
        // What the fast way leaves to this one: here the kernel has merged the marks (RFC 6040).
        let marked = Overlay { class: 0x03, ..from_member(&inner.clone().class(0x02)) };
        node.check_redirected(&tunnel, &format!("{family:?}: congestion experienced"), &marked, &inner.clone().class(0x03), EDGE);
        let with_options = Overlay { ip_options: vec![1, 1, 1, 0], ..from_member(&inner) };
        node.check_redirected(&tunnel, &format!("{family:?}: outer IP options"), &with_options, &inner, EDGE);
        let own = overlay(GATEWAY, ME, udp(family, GATEWAYS, EDGES).overlay_frame());
        node.check_redirected(
            &tunnel,
            &format!("{family:?}: of another gateway node's own pods"),
            &own,
            &udp(family, GATEWAYS, EDGES),
            EDGE,
        );
    }
}

#[test]
fn on_a_gateway_node_all_else_goes_to_the_stack_or_is_dropped() {
    require_root!();
    let node = Node::new(world::gateway());
    let tunnel = node.wire.on_node("raven-wg0");
    let arp = ethernet([0xff; 6], [2; 6], [0x08, 0x06], &[0; 28]);
    node.check("ARP inside", &overlay(MEMBER, ME, arp), NONE, Verdict::DropNotIp);
    for family in Family::BOTH {
        let inner = udp(family, MEMBERS, EDGES);
        let from = |outer: [u8; 4], inner: Packet| overlay(outer, ME, inner.overlay_frame());
        let good = from_member(&inner);
        let table = [
            ("another identifier", Overlay { vni: 201, ..good.clone() }, NONE, Verdict::DropWrongVni),
            ("identifier 0", Overlay { vni: 0, ..good.clone() }, NONE, Verdict::DropWrongVni),
            ("from a stranger", from(STRANGER, inner.clone()), NONE, Verdict::DropOuterNotInPool),
            ("a stranger with another pool's pods", from(STRANGER, udp(family, EDGES, MINE)), NONE, Verdict::DropOuterNotInPool),
            ("this node's pods as its own", from(MEMBER, udp(family, MINE, EDGES)), NONE, Verdict::DropSpoofedInner),
            ("another node's pods as its own", from(MEMBER, udp(family, GATEWAYS, EDGES)), NONE, Verdict::DropSpoofedInner),
            ("a gateway node with another node's pods", from(GATEWAY, inner.clone()), NONE, Verdict::DropSpoofedInner),
            ("nobody's pods", from(MEMBER, udp(family, NOBODYS, EDGES)), NONE, Verdict::DropSpoofedInner),
            ("a gateway node with nobody's pods", from(GATEWAY, udp(family, NOBODYS, MINE)), NONE, Verdict::DropSpoofedInner),
            ("another pool's pods from an ordinary node", from(MEMBER, udp(family, EDGES, MINE)), EDGE, Verdict::DropNotFromGateway),
            ("another pool's pods to another node", from(GATEWAY, udp(family, EDGES, MEMBERS)), EDGE, Verdict::DropNoRoute),
            ("another pool's pods to a third pool", from(GATEWAY, udp(family, EDGES, FARS)), EDGE, Verdict::DropNoRoute),
            ("another pool's pods to this node", from(GATEWAY, udp(family, EDGES, MINE)), EDGE, Verdict::Delivered),
            ("to nobody", from(MEMBER, udp(family, MEMBERS, NOBODYS)), NONE, Verdict::StackNotRemote),
            ("to this node", from(MEMBER, udp(family, MEMBERS, MINE)), NONE, Verdict::StackNotRemote),
            ("hops spent", from(MEMBER, inner.clone().ttl(1)), EDGE, Verdict::StackTtl),
            ("hops overspent", from(MEMBER, inner.clone().ttl(0)), EDGE, Verdict::StackTtl),
            ("one byte too long", from(MEMBER, inner.clone().len(TUNNEL_MTU as usize + 1)), EDGE, Verdict::StackTooBig),
        ];
        for (name, outer, gateway, verdict) in &table {
            node.check(&format!("{family:?}: {name}"), outer, *gateway, *verdict);
        }
        for (name, outer) in malformed(&good, family) {
            node.check(&format!("{family:?}: {name}"), &outer, NONE, Verdict::DropMalformed);
        }
        // The first thing to come by: nothing of the above went into the tunnel.
        node.check_redirected(&tunnel, &format!("{family:?}: a good one"), &good, &inner, EDGE);
    }
}

/// The frame with inner headers that contradict themselves. (Cut short they end in the VXLAN device, on new kernels.)
fn malformed(good: &Overlay, family: Family) -> Vec<(&'static str, Overlay)> {
    let edited = |name, edit: &dyn Fn(&mut Vec<u8>)| {
        let mut outer = good.clone();
        edit(&mut outer.inner);
        (name, outer)
    };
    let mut all = vec![edited("last byte missing", &|f| f.truncate(f.len() - 1)), edited("version 5", &|f| f[14] = 0x50 | f[14] & 0xf)];
    if family == Family::V4 {
        all.push(edited("header of 16 bytes", &|f| f[14] = 0x44));
        all.push(edited("shorter than its header", &|f| f[16..18].copy_from_slice(&[0, 19])));
    }
    all
}

#[test]
fn a_kernel_that_cannot_take_the_redirect_gets_it_in_the_stack() {
    require_root!();
    let node = Node::new(Config { flags: world::gateway().flags & !CONFIG_TUNNEL_REDIRECT, ..world::gateway() });
    for family in Family::BOTH {
        let inner = udp(family, MEMBERS, EDGES);
        node.check(&format!("{family:?}: good"), &from_member(&inner), EDGE, Verdict::StackNoRedirect);
        node.check(&format!("{family:?}: hops spent"), &from_member(&inner.clone().ttl(1)), EDGE, Verdict::StackTtl);
        node.check(&format!("{family:?}: spoofed"), &from_member(&udp(family, MINE, EDGES)), NONE, Verdict::DropSpoofedInner);
    }
}

#[test]
fn an_ordinary_node_takes_packets_for_its_pods_from_gateway_nodes_alone() {
    require_root!();
    let node = Node::new(world::ordinary());
    for family in Family::BOTH {
        let check = |name: &str, outer: [u8; 4], inner: Packet, gateway: GatewayId, verdict: Verdict| {
            node.check(&format!("{family:?}: {name}"), &overlay(outer, ME, inner.overlay_frame()), gateway, verdict);
        };
        check("from a gateway node", GATEWAY, udp(family, EDGES, MINE), EDGE, Verdict::Delivered);
        check("of a third pool", GATEWAY, udp(family, FARS, MINE), FAR, Verdict::Delivered);
        check("with the last hop", GATEWAY, udp(family, EDGES, MINE).ttl(1), EDGE, Verdict::Delivered);
        check("for another node", GATEWAY, udp(family, EDGES, MEMBERS), EDGE, Verdict::DropNoRoute);
        check("for nobody", GATEWAY, udp(family, EDGES, NOBODYS), EDGE, Verdict::DropNoRoute);
        check("from an ordinary node", MEMBER, udp(family, EDGES, MINE), EDGE, Verdict::DropNotFromGateway);
        check("from a stranger", STRANGER, udp(family, EDGES, MINE), NONE, Verdict::DropOuterNotInPool);
        check("a member's own, which is for gateway nodes", MEMBER, udp(family, MEMBERS, EDGES), NONE, Verdict::DropNotFromGateway);
        check("a gateway node's own", GATEWAY, udp(family, GATEWAYS, MINE), NONE, Verdict::DropNotFromGateway);
        check("spoofed", GATEWAY, udp(family, MEMBERS, MINE), NONE, Verdict::DropSpoofedInner);
    }
}

#[test]
fn connections_to_kubelets_of_other_pools_are_handed_to_the_proxy_with_a_tunnel_and_without() {
    require_root!();
    for (config, otherwise) in [(world::gateway(), Verdict::StackNotRemote), (world::ordinary(), Verdict::DropNotFromGateway)] {
        let node = Node::new(config);
        let inner = |packet: Packet| packet.overlay_frame();
        let segment = tcp(Family::V4, MEMBERS, KUBELET, ACK, &[]);
        let by_itself = |source: [u8; 4], packet: &Packet| sent_by(packet.overlay_frame(), source);
        let table = [
            ("of a member's pod", MEMBER, inner(segment.clone()), Verdict::ToProxy),
            ("of the member itself", MEMBER, by_itself(MEMBER, &segment), Verdict::ToProxy),
            ("of a member that says it is another", MEMBER, by_itself(GATEWAY, &segment), Verdict::DropSpoofedInner),
            ("of a member that says it is this node", MEMBER, by_itself(ME, &segment), Verdict::DropSpoofedInner),
            ("of a member with another's pod", MEMBER, inner(tcp(Family::V4, GATEWAYS, KUBELET, ACK, &[])), Verdict::DropSpoofedInner),
            ("of a stranger", STRANGER, inner(segment.clone()), Verdict::DropOuterNotInPool),
            ("no TCP", MEMBER, inner(udp(Family::V4, MEMBERS, KUBELET)), otherwise),
            ("a fragment, which shows no port", MEMBER, inner(segment.clone().fragment(1)), otherwise),
            ("to nobody", MEMBER, inner(tcp(Family::V4, MEMBERS, NOBODYS, ACK, &[])), otherwise),
            ("IPv6", MEMBER, inner(tcp(Family::V6, MEMBERS, KUBELET, ACK, &[])), otherwise),
            (
                "of the member itself, to nobody",
                MEMBER,
                by_itself(MEMBER, &tcp(Family::V4, MEMBERS, NOBODYS, ACK, &[])),
                Verdict::DropSpoofedInner,
            ),
        ];
        for (name, outer, frame, verdict) in table {
            node.check(&format!("{name} ({otherwise:?})"), &overlay(outer, ME, frame), NONE, verdict);
        }
    }
}
