//! Tests of `tunnel_ingress`: packets from the tunnel. They start at their IP header; [`crate::topology::Net`] explains
//! how a test run handles that. The outer header is compared with devices: the kernel inserts it behind the link-layer
//! header, which is 14 bytes too far back in a test run.

use raven_agent::bpf::Hook;
use raven_common::{
    Verdict,
    tables::{CONFIG_RELAY, Config, Count},
};
use raven_tests::require_root;

use crate::{
    case::{Case, check},
    dataplane::Dataplane,
    overlay_egress::{malformed, neither_tcp_nor_udp},
    packet::{ACK, Family, Overlay, Packet, assert_from_vxlan_device, overlay, tcp, udp},
    testbed::Testbed,
    topology::{self, EDGE, EDGES, FAR, FARS, ME, MEMBER, MEMBERS, MINE, NONE, UNKNOWN},
    tunnel_egress::not_ip,
};

#[test]
fn packets_go_to_destination_node_or_stack() {
    require_root!();
    let mut cases = Vec::new();
    for family in Family::BOTH {
        let case = |name: &str, packet: Vec<u8>| Case::new(format!("{family:?}: {name}"), packet);
        let (here, there) = (udp(family, EDGES, MINE), udp(family, EDGES, MEMBERS));
        let aggregate = tcp(family, EDGES, MEMBERS, ACK, &[1, 1, 8, 10, 0, 0, 0, 0, 0, 0, 0, 0]).len(3000);
        let headers = family.header_len() as u32 + 32;
        cases.extend([
            case("for this node", here.bytes()).passes(EDGE, Verdict::Delivered),
            case("for this node, TTL 1", here.clone().ttl(1).bytes()).passes(EDGE, Verdict::Delivered),
            case("for this node, above the tunnel's MTU", here.clone().len(1500).bytes())
                .passes(EDGE, Verdict::Delivered),
            case("for this node, an aggregate", here.clone().len(1500).bytes())
                .aggregate(3, 500)
                .passes(EDGE, Verdict::Delivered),
            case("for another node", there.bytes()).redirected(EDGE, Verdict::ToOverlay).becomes_elsewhere(),
            case("for another node, TTL 2", there.clone().ttl(2).bytes())
                .redirected(EDGE, Verdict::ToOverlay)
                .becomes_elsewhere(),
            case("for another node, TTL 1", there.clone().ttl(1).bytes()).passes(EDGE, Verdict::StackTtl),
            case("for another node, TTL 0", there.clone().ttl(0).bytes()).passes(EDGE, Verdict::StackTtl),
            case("for another node, of the tunnel's MTU", there.clone().len(1420).bytes())
                .redirected(EDGE, Verdict::ToOverlay)
                .becomes_elsewhere(),
            case("for another node, one byte above the tunnel's MTU", there.clone().len(1421).bytes())
                .passes(EDGE, Verdict::StackTooBig),
            // A test run cannot set an aggregate's type, and the kernel wraps none of unknown type: the
            // tunnel key is used.
            case("for another node, an aggregate whose segments fit", aggregate.bytes())
                .aggregate(3, 1420 - headers)
                .redirected(EDGE, Verdict::ToOverlayKey)
                .becomes(aggregate.clone().ttl(63).overlay_frame()),
            case("for another node, an aggregate whose segments do not fit", aggregate.bytes())
                .aggregate(3, 1421 - headers)
                .passes(EDGE, Verdict::StackTooBig),
            case("for another node, a UDP aggregate whose datagrams fit", there.clone().len(3000).bytes())
                .aggregate(3, 1420 - family.header_len() as u32 - 8)
                .redirected(EDGE, Verdict::ToOverlayKey)
                .becomes(there.clone().len(3000).ttl(63).overlay_frame()),
            case("for another node, a UDP aggregate whose datagrams do not fit", there.clone().len(3000).bytes())
                .aggregate(3, 1421 - family.header_len() as u32 - 8)
                .passes(EDGE, Verdict::StackTooBig),
        ]);
    }
    for (name, packet) in neither_tcp_nor_udp(EDGES, MEMBERS) {
        let name = format!("{:?}: {name}, for another node", packet.family);
        cases.push(Case::new(name, packet.bytes()).redirected(EDGE, Verdict::ToOverlay).becomes_elsewhere());
    }
    for (name, packet) in neither_tcp_nor_udp(EDGES, MINE) {
        cases.push(
            Case::new(format!("{:?}: {name}, for this node", packet.family), packet.bytes())
                .passes(EDGE, Verdict::Delivered),
        );
    }
    check(&Dataplane::load(topology::gateway()), Hook::TunnelIngress, &cases);
}

#[test]
fn disallowed_packets_of_peer_are_dropped() {
    require_root!();
    let mut cases = vec![not_ip()];
    for family in Family::BOTH {
        let case = |name: &str, packet: Vec<u8>| Case::new(format!("{family:?}: {name}"), packet);
        cases.extend(malformed(family, &udp(family, EDGES, MEMBERS).bytes(), 0));
        cases.extend([
            case("from an unknown prefix", udp(family, UNKNOWN, MINE).bytes())
                .dropped(NONE, Verdict::DropSourceNotRemote),
            case("with a source of this pool", udp(family, MEMBERS, MINE).bytes())
                .dropped(NONE, Verdict::DropSourceNotRemote),
            case("with a source of this node", udp(family, MINE, MEMBERS).bytes())
                .dropped(NONE, Verdict::DropSourceNotRemote),
            case("to an unknown prefix", udp(family, EDGES, UNKNOWN).bytes()).dropped(EDGE, Verdict::DropNoRoute),
            case("back to the same pool", udp(family, EDGES, EDGES).bytes()).dropped(EDGE, Verdict::DropRelayLoop),
        ]);
    }
    check(&Dataplane::load(topology::gateway()), Hook::TunnelIngress, &cases);
}

#[test]
fn relay_changes_only_the_hop_count() {
    require_root!();
    let mut cases = Vec::new();
    for family in Family::BOTH {
        let case = |name: &str, packet: Vec<u8>| Case::new(format!("{family:?}: {name}"), packet);
        let packet = udp(family, EDGES, FARS);
        cases.extend((2..=255).map(|ttl| {
            let after = packet.clone().ttl(ttl - 1).bytes();
            case(&format!("TTL {ttl}"), packet.clone().ttl(ttl).bytes())
                .redirected(FAR, Verdict::Relayed)
                .becomes(after)
        }));
        let aggregate = tcp(family, EDGES, FARS, ACK, &[]).len(2500);
        cases.extend([
            case("an aggregate", aggregate.bytes())
                .aggregate(2, 1240)
                .redirected(FAR, Verdict::Relayed)
                .becomes(aggregate.clone().ttl(63).bytes()),
            case("TTL 1", packet.clone().ttl(1).bytes()).passes(FAR, Verdict::StackTtl),
            case("TTL 0", packet.clone().ttl(0).bytes()).passes(FAR, Verdict::StackTtl),
            case("above the tunnel's MTU", packet.clone().len(1421).bytes()).passes(FAR, Verdict::StackTooBig),
        ]);
    }
    check(&Dataplane::load(topology::gateway()), Hook::TunnelIngress, &cases);
}

#[test]
fn no_relay_without_relay_flag() {
    require_root!();
    let config = Config { flags: topology::gateway().flags & !CONFIG_RELAY, ..topology::gateway() };
    let mut cases = Vec::new();
    for family in Family::BOTH {
        let case = |name: &str, packet: Vec<u8>| Case::new(format!("{family:?}: {name}"), packet);
        cases.extend([
            case("to a third pool", udp(family, EDGES, FARS).bytes()).dropped(FAR, Verdict::DropNoRoute),
            case("back to the same pool", udp(family, EDGES, EDGES).bytes()).dropped(EDGE, Verdict::DropRelayLoop),
            case("for this node", udp(family, EDGES, MINE).bytes()).passes(EDGE, Verdict::Delivered),
        ]);
    }
    check(&Dataplane::load(config), Hook::TunnelIngress, &cases);
}

#[test]
fn packets_of_members_go_back_into_tunnel_in_a_pool_with_encryption() {
    require_root!();
    let mut cases = vec![not_ip()];
    for family in Family::BOTH {
        let case = |name: &str, packet: Vec<u8>| Case::new(format!("{family:?}: {name}"), packet);
        cases.extend(malformed(family, &udp(family, MEMBERS, EDGES).bytes(), 0));
        for (name, packet, gateway, verdict) in [
            ("from a member", udp(family, MEMBERS, EDGES), EDGE, Verdict::FromMember),
            ("for a member", udp(family, EDGES, MEMBERS), EDGE, Verdict::ToMember),
            ("relayed", udp(family, EDGES, FARS), FAR, Verdict::Relayed),
        ] {
            let case = |what: &str, packet: &Packet| case(&format!("{name}, {what}"), packet.bytes());
            let largest = packet.clone().len(1420);
            let too_big = case("one byte above the tunnel's MTU", &packet.clone().len(1421));
            let aggregate = packet.clone().len(3000);
            cases.extend([
                case("TTL 2", &packet.clone().ttl(2))
                    .redirected(gateway, verdict)
                    .becomes(packet.clone().ttl(1).bytes()),
                case("TTL 1", &packet.clone().ttl(1)).passes(gateway, Verdict::StackTtl),
                case("of the tunnel's MTU", &largest).redirected(gateway, verdict).becomes(largest.ttl(63).bytes()),
                case("an aggregate whose datagrams fit", &aggregate)
                    .aggregate(3, 1420 - family.header_len() as u32 - 8)
                    .redirected(gateway, verdict)
                    .becomes(aggregate.clone().ttl(63).bytes()),
                match verdict {
                    // The stack would forward it on the LAN, in clear.
                    Verdict::ToMember => {
                        too_big.redirected(gateway, verdict).becomes(packet.clone().len(1421).ttl(63).bytes())
                    }
                    _ => too_big.passes(gateway, Verdict::StackTooBig),
                },
            ]);
        }
        cases.extend([
            case("for this node", udp(family, EDGES, MINE).bytes()).passes(EDGE, Verdict::Delivered),
            case("from a member to this node", udp(family, MEMBERS, MINE).bytes()).dropped(NONE, Verdict::DropNoRoute),
            case("from a member to an unknown prefix", udp(family, MEMBERS, UNKNOWN).bytes())
                .dropped(NONE, Verdict::DropNoRoute),
            case("from an unknown prefix", udp(family, UNKNOWN, EDGES).bytes())
                .dropped(NONE, Verdict::DropSourceNotRemote),
            case("from an unknown prefix to a member", udp(family, UNKNOWN, MEMBERS).bytes())
                .dropped(NONE, Verdict::DropSourceNotRemote),
            case("back to the same pool", udp(family, EDGES, EDGES).bytes()).dropped(EDGE, Verdict::DropRelayLoop),
        ]);
    }
    check(&Dataplane::load(topology::encrypted()), Hook::TunnelIngress, &cases);
}

#[test]
fn outer_header_is_exact_on_devices() {
    require_root!();
    let testbed = Testbed::new(topology::gateway(), &[Hook::TunnelIngress], 1500);
    let lan = testbed.on_lan();
    for family in Family::BOTH {
        let datagram = udp(family, EDGES, MEMBERS);
        let packets: [(&str, Packet); 6] = [
            ("a datagram", datagram.clone()),
            ("a segment", tcp(family, EDGES, MEMBERS, ACK, &[]).data(b"odd")),
            ("DSCP and ECN", datagram.clone().class(0xb9)),
            ("congestion experienced", datagram.clone().class(0x03)),
            ("with TTL 2", datagram.clone().ttl(2)),
            ("of the tunnel's MTU", datagram.clone().len(1420)),
        ];
        let mut ports = Vec::new();
        for (name, packet) in packets {
            let what = format!("{family:?}: {name}");
            let bytes = packet.bytes();
            let counted = testbed.counted(&what, || testbed.decrypted(&bytes));
            let expected = [((EDGE, Verdict::ToOverlay), Count { packets: 1, bytes: bytes.len() as u64 })];
            assert_eq!(counted, expected.into(), "{what}");
            let inner = packet.clone().ttl(packet.ttl - 1).overlay_frame();
            let outer = Overlay { class: packet.class, ..overlay(ME, MEMBER, inner).leaving() };
            ports.push(lan.expect_overlay(&what, &outer));
        }
        assert!(ports.iter().all(|port| *port >= 0xc000), "{family:?}: source ports {ports:?}");
        assert_ne!(ports[0], ports[1], "{family:?}: different flows must have different source ports");
        assert!(
            ports[2..].iter().all(|port| *port == ports[0]),
            "{family:?}: one flow must have one source port: {ports:?}"
        );
    }
}

#[test]
fn truncated_headers_are_dropped_on_devices() {
    require_root!();
    let testbed = Testbed::new(topology::gateway(), &[Hook::TunnelIngress], 1500);
    let lan = testbed.on_lan();
    for family in Family::BOTH {
        let good = udp(family, EDGES, MEMBERS);
        for len in [1, 12, family.header_len() - 1] {
            let what = format!("{family:?}: {len} bytes");
            let counted = testbed.counted(&what, || testbed.decrypted(&good.bytes()[..len]));
            assert_eq!(
                counted,
                [((NONE, Verdict::DropMalformed), Count { packets: 1, bytes: len as u64 })].into(),
                "{what}"
            );
        }
        testbed.decrypted(&good.bytes());
        lan.expect_overlay("the first packet", &overlay(ME, MEMBER, good.ttl(63).overlay_frame()).leaving());
    }
}

#[test]
fn relayed_packets_return_into_tunnel_on_devices() {
    require_root!();
    let testbed = Testbed::new(topology::gateway(), &[Hook::TunnelIngress, Hook::TunnelEgress], 1500);
    let tunnel = testbed.on_node("raven-wg0");
    for family in Family::BOTH {
        let packet = udp(family, EDGES, FARS).class(0xb9);
        let what = format!("{family:?}: relayed");
        let counted = testbed.counted(&what, || testbed.decrypted(&packet.bytes()));
        let bytes = packet.bytes().len() as u64;
        assert_eq!(counted, [((FAR, Verdict::Relayed), Count { packets: 1, bytes })].into(), "{what}");
        tunnel.expect(&format!("{family:?}: received"), &packet.bytes());
        tunnel.expect(&what, &packet.ttl(63).bytes());
    }
}

#[test]
fn unwrappable_packets_use_tunnel_key_on_devices() {
    require_root!();
    // A packet (not an aggregate) near the kernel's size limit for helpers may get its Ethernet header but
    // not the outer header. The limit depends on the machine; of lengths 40 apart, at least one is within the
    // 50 bytes before it.
    let config = Config { tunnel_mtu: 19_000, ..topology::gateway() };
    let testbed = Testbed::new(config, &[Hook::TunnelIngress, Hook::OverlayEgress], 20_000);
    let lan = testbed.on_lan();
    for family in Family::BOTH {
        let fallen_back = (15_600..16_400).step_by(40).any(|len| {
            let packet = udp(family, EDGES, MEMBERS).class(0xb9).len(len);
            let what = format!("{family:?}: {len} bytes");
            let counted = testbed.counted(&what, || testbed.decrypted(&packet.bytes()));
            let (&(gateway, verdict), count) = counted.first_key_value().expect("a counter");
            assert_eq!(
                (counted.len(), gateway, *count),
                (1, EDGE, Count { packets: 1, bytes: len as u64 }),
                "{what}: {counted:?}"
            );
            match verdict {
                Verdict::ToOverlay => {
                    lan.next(&what);
                    false
                }
                Verdict::ToOverlayKey => {
                    assert_from_vxlan_device(&lan.next(&what), &what, ME, MEMBER, &packet.ttl(63));
                    true
                }
                other => panic!("{what}: {other:?}"),
            }
        });
        assert!(fallen_back, "{family:?}: wrapping in place fails for no length");
    }
}
