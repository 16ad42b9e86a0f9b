//! `uplink_ingress`: every packet of the uplink passes here; only those that XDP left a note on are ours. A test run has
//! no metadata, so it shows the strangers; the way XDP → TC → tunnel is shown on real devices.

use raven_agent::bpf::Hook;
use raven_common::{Verdict, tables::Count};
use raven_tests::require_root;

use crate::{
    case::{Case, check},
    dataplane::Dataplane,
    packet::{ACK, Family, Overlay, ethernet, overlay, tcp, udp},
    wire::Wire,
    world::{self, EDGE, EDGES, FAR, FARS, ME, MEMBER, MEMBERS, MINE, NONE, STRANGER, TUNNEL_MTU},
};

#[test]
fn packets_without_a_note_pass_unseen() {
    require_root!();
    let mut cases = vec![Case::new("ARP", ethernet([0xff; 6], [2; 6], [0x08, 0x06], &[0; 46]))];
    for family in Family::BOTH {
        let inner = udp(family, MEMBERS, EDGES);
        cases.extend([
            Case::new(format!("{family:?}: a plain packet"), udp(family, EDGES, MINE).frame()),
            Case::new(format!("{family:?}: what would be ours with a note"), inner.frame()),
            Case::new(format!("{family:?}: an overlay packet"), overlay(MEMBER, ME, inner.overlay_frame()).frame()),
            Case::new(format!("{family:?}: an aggregate"), inner.clone().len(3000).frame()).aggregate(3, 1000),
        ]);
    }
    check(&Dataplane::load(world::gateway()), Hook::UplinkIngress, &cases);
}

#[test]
fn on_the_wire_what_xdp_unwrapped_goes_into_the_tunnel_with_one_hop_less() {
    require_root!();
    let wire = Wire::new(world::gateway(), &[Hook::UplinkXdp, Hook::UplinkIngress], 1500);
    // The port hears all devices: whoever else looks at the uplink (tcpdump, a DHCP client, lldpd) is no reason to
    // leave the fast way either. (The kernel shares the packet with them, and takes XDP's note off what it must copy.)
    let (lan, tunnel) = (wire.lan_sender(), wire.on_node("raven-wg0"));
    for family in Family::BOTH {
        let inner = udp(family, MEMBERS, EDGES);
        let packets = [
            ("a datagram", inner.clone(), EDGE),
            ("a segment", tcp(family, MEMBERS, EDGES, ACK, &[]).data(b"odd"), EDGE),
            ("to a third pool", udp(family, MEMBERS, FARS), FAR),
            ("DSCP and ECN", inner.clone().class(0xb9), EDGE),
            ("with a hop left", inner.clone().ttl(2), EDGE),
            ("as long as the tunnel takes", inner.clone().len(TUNNEL_MTU as usize), EDGE),
        ];
        for (name, packet, gateway) in packets {
            let what = format!("{family:?}: {name}");
            let counted = wire.counted(&what, || lan.send(&overlay(MEMBER, ME, packet.overlay_frame()).frame()));
            // Counted with the Ethernet header that the unwrapped frame has.
            let bytes = packet.bytes().len() as u64 + 14;
            assert_eq!(counted, [((gateway, Verdict::ToTunnelFast), Count { packets: 1, bytes })].into(), "{what}");
            tunnel.expect(&what, &packet.clone().ttl(packet.ttl - 1).bytes());
        }
        for ttl in 2..=255 {
            let packet = inner.clone().ttl(ttl);
            lan.send(&overlay(MEMBER, ME, packet.overlay_frame()).frame());
            tunnel.expect(&format!("{family:?}: TTL {ttl}"), &packet.ttl(ttl - 1).bytes());
        }
    }
}

#[test]
fn on_the_wire_what_xdp_left_alone_takes_the_other_way() {
    require_root!();
    let wire = Wire::new(world::gateway(), &[Hook::UplinkXdp, Hook::UplinkIngress, Hook::OverlayIngress], 1500);
    let (lan, tunnel) = (wire.lan_sender(), wire.on_node("raven-wg0"));
    for family in Family::BOTH {
        let inner = udp(family, MEMBERS, EDGES);
        let bytes = inner.overlay_frame().len() as u64;
        let marked = Overlay { class: 0x03, ..overlay(MEMBER, ME, inner.clone().class(0x01).overlay_frame()) };
        let counted = wire.counted("congestion experienced", || lan.send(&marked.frame()));
        assert_eq!(counted, [((EDGE, Verdict::ToTunnel), Count { packets: 1, bytes })].into(), "{family:?}: {counted:?}");
        tunnel.expect("congestion experienced", &inner.clone().class(0x03).ttl(63).bytes());
        let spent = overlay(MEMBER, ME, inner.clone().ttl(1).overlay_frame());
        let counted = wire.counted("hops spent", || lan.send(&spent.frame()));
        assert_eq!(counted, [((EDGE, Verdict::StackTtl), Count { packets: 1, bytes })].into(), "{family:?}: {counted:?}");
        let stranger = overlay(STRANGER, ME, inner.overlay_frame()).frame();
        let counted = wire.counted("a stranger", || lan.send(&stranger));
        let bytes = stranger.len() as u64;
        assert_eq!(counted, [((NONE, Verdict::DropOuterNotInPool), Count { packets: 1, bytes })].into(), "{family:?}: {counted:?}");
    }
}
