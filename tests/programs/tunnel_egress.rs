//! Tests of `tunnel_egress`: packets of a gateway node and its own pods. They start at their IP header;
//! [`crate::topology::Net`] explains how a test run handles that.

use raven_agent::bpf::Hook;
use raven_common::{Verdict, tables::Count};
use raven_tests::require_root;

use crate::{
    case::{Case, check},
    dataplane::Dataplane,
    overlay_egress::{fitting_mss, malformed, odd_syns, syns},
    packet::{ACK, Family, Packet, SYN, tcp, udp},
    testbed::Testbed,
    topology::{self, EDGE, EDGES, FAR, FARS, MEMBERS, MINE, NONE, UNKNOWN},
};

/// Expects that the packet enters the tunnel through the stack, as `after`.
fn from_stack(name: &str, before: &Packet, after: &Packet) -> Case {
    Case::new(format!("{:?}: {name}", before.family), before.bytes())
        .passes(EDGE, Verdict::FromStack)
        .becomes(after.bytes())
}

#[test]
fn own_packets_are_counted_and_redirected_ones_unchanged() {
    require_root!();
    let mut cases = Vec::new();
    for family in Family::BOTH {
        let datagram = udp(family, MINE, EDGES);
        let syn_of_member = tcp(family, MEMBERS, EDGES, SYN, &[2, 4, 5, 180]);
        cases.extend([
            from_stack("a datagram", &datagram, &datagram),
            from_stack("TTL 1", &datagram.clone().ttl(1), &datagram.clone().ttl(1)),
            from_stack("an aggregate", &datagram.clone().len(2000), &datagram.clone().len(2000)).aggregate(5, 400),
            from_stack("a segment", &tcp(family, MINE, EDGES, ACK, &[]), &tcp(family, MINE, EDGES, ACK, &[])),
            Case::new(format!("{family:?}: to a third pool"), udp(family, MINE, FARS).bytes())
                .passes(FAR, Verdict::FromStack),
            Case::new(format!("{family:?}: to an unknown prefix"), udp(family, MINE, UNKNOWN).bytes())
                .passes(NONE, Verdict::FromStack),
            Case::new(format!("{family:?}: redirected, from another node"), udp(family, MEMBERS, EDGES).bytes()),
            Case::new(format!("{family:?}: redirected SYN, clamped on the sender's node"), syn_of_member.bytes()),
            Case::new(format!("{family:?}: relayed, from another pool"), udp(family, FARS, EDGES).bytes()),
            Case::new(format!("{family:?}: from an unknown prefix"), udp(family, UNKNOWN, EDGES).bytes()),
        ]);
    }
    check(&Dataplane::load(topology::gateway()), Hook::TunnelEgress, &cases);
}

#[test]
fn sources_in_no_pool_are_dropped_in_a_pool_with_encryption() {
    require_root!();
    let mut cases = Vec::new();
    for family in Family::BOTH {
        let dropped = |name: &str, packet: Packet, gateway| {
            Case::new(format!("{family:?}: {name}"), packet.bytes()).dropped(gateway, Verdict::DropSourceNotMine)
        };
        let own = udp(family, MINE, EDGES);
        cases.extend([
            from_stack("its own", &own, &own),
            Case::new(format!("{family:?}: redirected, from a member"), udp(family, MEMBERS, EDGES).bytes()),
            Case::new(format!("{family:?}: redirected, to a member"), udp(family, EDGES, MEMBERS).bytes()),
            dropped("masqueraded", udp(family, UNKNOWN, EDGES), EDGE),
            dropped("to an unknown prefix", udp(family, UNKNOWN, UNKNOWN), NONE),
        ]);
    }
    check(&Dataplane::load(topology::encrypted()), Hook::TunnelEgress, &cases);
}

#[test]
fn mss_of_own_syns_is_clamped_and_malformed_packets_dropped() {
    require_root!();
    let mut cases = vec![not_ip()];
    for family in Family::BOTH {
        cases.extend(syns(family).iter().map(|(name, before, after)| from_stack(name, before, after)));
        cases.extend(odd_syns(family).iter().map(|(name, packet)| from_stack(name, packet, packet)));
        cases.extend(malformed(family, &udp(family, MINE, EDGES).bytes(), 0));
    }
    check(&Dataplane::load(topology::gateway()), Hook::TunnelEgress, &cases);
}

/// Returns a packet that is neither IPv4 nor IPv6 for the kernel.
pub(crate) fn not_ip() -> Case {
    let mut packet = udp(Family::V4, MINE, EDGES).bytes();
    packet[12..14].copy_from_slice(&[0x08, 0x06]);
    Case::new("neither IPv4 nor IPv6", packet).dropped(NONE, Verdict::DropNotIp)
}

#[test]
fn syns_enter_tunnel_with_clamped_mss_on_devices() {
    require_root!();
    let testbed = Testbed::new(topology::gateway(), &[Hook::TunnelEgress], 1500);
    let tunnel = testbed.on_node("raven-wg0");
    for family in Family::BOTH {
        let own =
            |mss: u16| tcp(family, MINE, EDGES, SYN, &[[1, 2, 4].as_slice(), &mss.to_be_bytes(), &[1, 1, 0]].concat());
        let what = format!("{family:?}: a SYN");
        let before = own(1460).bytes();
        let counted = testbed.counted(&what, || testbed.send_into_tunnel(&before));
        assert_eq!(
            counted,
            [((EDGE, Verdict::FromStack), Count { packets: 1, bytes: before.len() as u64 })].into(),
            "{what}"
        );
        tunnel.expect(&what, &own(fitting_mss(family)).bytes());
        let foreign = tcp(family, MEMBERS, EDGES, SYN, &[2, 4, 5, 180]).bytes();
        testbed.send_into_tunnel(&foreign);
        tunnel.expect(&format!("{family:?}: a SYN of another node"), &foreign);
    }
}
