//! Tests of `uplink_ingress`, which receives every packet of the uplink and processes those with XDP metadata. A test
//! run has no metadata, so it covers other packets; the path XDP → TC → tunnel is tested with devices.

use raven_agent::bpf::Hook;
use raven_common::{Verdict, tables::Count};
use raven_tests::require_root;

use crate::{
    case::{Case, check},
    dataplane::Dataplane,
    packet::{ACK, Family, Overlay, ethernet, overlay, tcp, udp},
    testbed::Testbed,
    topology::{self, EDGE, EDGES, FAR, FARS, ME, MEMBER, MEMBERS, MINE, NONE, OUTSIDER, TUNNEL_MTU},
};

#[test]
fn packets_without_metadata_pass_uncounted() {
    require_root!();
    let mut cases = vec![Case::new("ARP", ethernet([0xff; 6], [2; 6], [0x08, 0x06], &[0; 46]))];
    for family in Family::BOTH {
        let inner = udp(family, MEMBERS, EDGES);
        cases.extend([
            Case::new(format!("{family:?}: a plain packet"), udp(family, EDGES, MINE).frame()),
            Case::new(format!("{family:?}: an inner packet without metadata"), inner.frame()),
            Case::new(format!("{family:?}: an overlay packet"), overlay(MEMBER, ME, inner.overlay_frame()).frame()),
            Case::new(format!("{family:?}: an aggregate"), inner.clone().len(3000).frame()).aggregate(3, 1000),
        ]);
    }
    check(&Dataplane::load(topology::gateway()), Hook::UplinkIngress, &cases);
}

#[test]
fn unwrapped_packets_enter_tunnel_on_devices() {
    require_root!();
    let testbed = Testbed::new(topology::gateway(), &[Hook::UplinkXdp, Hook::UplinkIngress], 1500);
    // The port's socket also receives the uplink's packets, like tcpdump, a DHCP client or lldpd on a node. That must
    // not disable the fast tier. (The kernel shares the packet with them and drops the metadata from copies.)
    let (lan, tunnel) = (testbed.lan_sender(), testbed.on_node("raven-wg0"));
    for family in Family::BOTH {
        let inner = udp(family, MEMBERS, EDGES);
        let packets = [
            ("a datagram", inner.clone(), EDGE),
            ("a segment", tcp(family, MEMBERS, EDGES, ACK, &[]).data(b"odd"), EDGE),
            ("to a third pool", udp(family, MEMBERS, FARS), FAR),
            ("DSCP and ECN", inner.clone().class(0xb9), EDGE),
            ("with TTL 2", inner.clone().ttl(2), EDGE),
            ("of the tunnel's MTU", inner.clone().len(TUNNEL_MTU as usize), EDGE),
        ];
        for (name, packet, gateway) in packets {
            let what = format!("{family:?}: {name}");
            let counted = testbed.counted(&what, || lan.send(&overlay(MEMBER, ME, packet.overlay_frame()).frame()));
            // The count includes the Ethernet header of the unwrapped frame.
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
fn other_packets_take_the_fallback_tier_on_devices() {
    require_root!();
    let testbed =
        Testbed::new(topology::gateway(), &[Hook::UplinkXdp, Hook::UplinkIngress, Hook::OverlayIngress], 1500);
    let (lan, tunnel) = (testbed.lan_sender(), testbed.on_node("raven-wg0"));
    for family in Family::BOTH {
        let inner = udp(family, MEMBERS, EDGES);
        let bytes = inner.overlay_frame().len() as u64;
        let marked = Overlay { class: 0x03, ..overlay(MEMBER, ME, inner.clone().class(0x01).overlay_frame()) };
        let counted = testbed.counted("congestion experienced", || lan.send(&marked.frame()));
        assert_eq!(
            counted,
            [((EDGE, Verdict::ToTunnel), Count { packets: 1, bytes })].into(),
            "{family:?}: {counted:?}"
        );
        tunnel.expect("congestion experienced", &inner.clone().class(0x03).ttl(63).bytes());
        let spent = overlay(MEMBER, ME, inner.clone().ttl(1).overlay_frame());
        let counted = testbed.counted("TTL 1", || lan.send(&spent.frame()));
        assert_eq!(
            counted,
            [((EDGE, Verdict::StackTtl), Count { packets: 1, bytes })].into(),
            "{family:?}: {counted:?}"
        );
        let outsider = overlay(OUTSIDER, ME, inner.overlay_frame()).frame();
        let counted = testbed.counted("from outside the pool", || lan.send(&outsider));
        let bytes = outsider.len() as u64;
        assert_eq!(
            counted,
            [((NONE, Verdict::DropOuterNotInPool), Count { packets: 1, bytes })].into(),
            "{family:?}: {counted:?}"
        );
    }
}
