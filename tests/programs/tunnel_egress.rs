//! `tunnel_egress`: what a gateway node and its own pods send. Packets start at their IP header; [`crate::world::Net`] says
//! how a test run takes them nevertheless.

use raven_agent::bpf::Hook;
use raven_common::{Verdict, tables::Count};
use raven_tests::require_root;

use crate::{
    case::{Case, check},
    dataplane::Dataplane,
    overlay_egress::{fitting_mss, malformed, odd_syns, syns},
    packet::{ACK, Family, Packet, SYN, tcp, udp},
    wire::Wire,
    world::{self, EDGE, EDGES, FAR, FARS, MEMBERS, MINE, NOBODYS, NONE},
};

/// Enters the tunnel by way of the stack, as `after`.
fn from_stack(name: &str, before: &Packet, after: &Packet) -> Case {
    Case::new(format!("{:?}: {name}", before.family), before.bytes()).passes(EDGE, Verdict::FromStack).becomes(after.bytes())
}

#[test]
fn own_packets_are_counted_and_redirected_ones_left_alone() {
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
            Case::new(format!("{family:?}: to a third pool"), udp(family, MINE, FARS).bytes()).passes(FAR, Verdict::FromStack),
            Case::new(format!("{family:?}: to nobody"), udp(family, MINE, NOBODYS).bytes()).passes(NONE, Verdict::FromStack),
            Case::new(format!("{family:?}: redirected, from another node"), udp(family, MEMBERS, EDGES).bytes()),
            Case::new(format!("{family:?}: redirected, its SYN was seen to where it came from"), syn_of_member.bytes()),
            Case::new(format!("{family:?}: relayed, from another pool"), udp(family, FARS, EDGES).bytes()),
            Case::new(format!("{family:?}: from nobody"), udp(family, NOBODYS, EDGES).bytes()),
        ]);
    }
    check(&Dataplane::load(world::gateway()), Hook::TunnelEgress, &cases);
}

#[test]
fn the_mss_of_own_syns_is_lowered_and_nonsense_dropped() {
    require_root!();
    let mut cases = vec![not_ip()];
    for family in Family::BOTH {
        cases.extend(syns(family).iter().map(|(name, before, after)| from_stack(name, before, after)));
        cases.extend(odd_syns(family).iter().map(|(name, packet)| from_stack(name, packet, packet)));
        cases.extend(malformed(family, &udp(family, MINE, EDGES).bytes(), 0));
    }
    check(&Dataplane::load(world::gateway()), Hook::TunnelEgress, &cases);
}

/// A packet that the kernel takes for neither family.
pub fn not_ip() -> Case {
    let mut packet = udp(Family::V4, MINE, EDGES).bytes();
    packet[12..14].copy_from_slice(&[0x08, 0x06]);
    Case::new("neither IPv4 nor IPv6", packet).dropped(NONE, Verdict::DropNotIp)
}

#[test]
fn on_the_wire_syns_enter_the_tunnel_with_an_mss_that_fits() {
    require_root!();
    let wire = Wire::new(world::gateway(), &[Hook::TunnelEgress], 1500);
    let tunnel = wire.on_node("raven-wg0");
    for family in Family::BOTH {
        let own = |mss: u16| tcp(family, MINE, EDGES, SYN, &[[1, 2, 4].as_slice(), &mss.to_be_bytes(), &[1, 1, 0]].concat());
        let what = format!("{family:?}: a SYN");
        let before = own(1460).bytes();
        let counted = wire.counted(&what, || wire.send_into_tunnel(&before));
        assert_eq!(counted, [((EDGE, Verdict::FromStack), Count { packets: 1, bytes: before.len() as u64 })].into(), "{what}");
        tunnel.expect(&what, &own(fitting_mss(family)).bytes());
        let foreign = tcp(family, MEMBERS, EDGES, SYN, &[2, 4, 5, 180]).bytes();
        wire.send_into_tunnel(&foreign);
        tunnel.expect(&format!("{family:?}: another node's"), &foreign);
    }
}
