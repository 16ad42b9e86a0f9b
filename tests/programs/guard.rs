//! Tests of the guard, in XDP and at TC ingress, and of the samples of dropped packets.

use raven_agent::bpf::Hook;
use raven_common::{
    Verdict,
    header::{ETH_P_IP, ETH_P_IPV6, IPPROTO_UDP},
    tables::{CONFIG_TC_GUARD, Config, MAX_HANDSHAKES},
};
use raven_tests::require_root;

use crate::{
    case::{Case, check},
    dataplane::{Context, Dataplane},
    packet::{Family, Overlay, ethernet, node6, overlay, udp},
    topology::{self, EDGES, GATEWAY, ME, MEMBER, MEMBERS, NONE, OUTSIDER, TUNNEL_PORT},
};

/// Returns a UDP packet to a port of a node, between the nodes' addresses of a family.
fn datagram(family: Family, from: [u8; 4], to: [u8; 4], port: u16, payload: &[u8]) -> Vec<u8> {
    let len = ((8 + payload.len()) as u16).to_be_bytes();
    let mut ip = match family {
        Family::V4 => {
            let total = ((28 + payload.len()) as u16).to_be_bytes();
            // The header's checksum is verified only in the stack, so it stays zero.
            [&[0x45, 0][..], &total, &[0, 0, 0, 0, 64, IPPROTO_UDP, 0, 0], &from, &to].concat()
        }
        Family::V6 => [&[0x60, 0, 0, 0][..], &len, &[IPPROTO_UDP, 64], &node6(from), &node6(to)].concat(),
    };
    ip.extend([0x9c, 0x40]);
    ip.extend(port.to_be_bytes());
    ip.extend(len);
    ip.extend([0, 0]);
    ip.extend(payload);
    ethernet([2; 6], [4; 6], family.ethertype(), &ip)
}

/// Returns a message with a valid WireGuard header and arbitrary content.
fn message(kind: u8, len: usize) -> Vec<u8> {
    let mut message = vec![0x5a; len];
    message[..4].copy_from_slice(&[kind, 0, 0, 0]);
    message
}

fn to_tunnel(family: Family, payload: &[u8]) -> Vec<u8> {
    datagram(family, OUTSIDER, ME, TUNNEL_PORT, payload)
}

/// Frames with their descriptions.
type Named = Vec<(String, Vec<u8>)>;

/// Returns the frames that the guard must pass and those that it must drop.
fn messages(family: Family) -> (Named, Named) {
    let to_tunnel = |payload: &[u8]| to_tunnel(family, payload);
    let datagram = |to, port| datagram(family, OUTSIDER, to, port, b"garbage");
    let named = |list: Vec<(&str, Vec<u8>)>| -> Named {
        list.into_iter().map(|(name, frame)| (format!("{family:?}: {name}"), frame)).collect()
    };
    let reserved = {
        let mut m = message(4, 64);
        m[2] = 1;
        m
    };
    let passes = vec![
        ("an initiation", to_tunnel(&message(1, 148))),
        ("a response", to_tunnel(&message(2, 92))),
        ("a cookie", to_tunnel(&message(3, 64))),
        ("a keepalive", to_tunnel(&message(4, 32))),
        ("data", to_tunnel(&message(4, 32 + 1280))),
        ("data without padding, as some implementations send it", to_tunnel(&message(4, 92 + 5))),
        ("an invalid message to another port", datagram(ME, TUNNEL_PORT + 1)),
        ("an invalid message to another node", datagram(GATEWAY, TUNNEL_PORT)),
    ];
    let refused = vec![
        ("an initiation too short", to_tunnel(&message(1, 147))),
        ("an initiation too long", to_tunnel(&message(1, 149))),
        ("a response of another length", to_tunnel(&message(2, 148))),
        ("a cookie of another length", to_tunnel(&message(3, 65))),
        ("data without a tag", to_tunnel(&message(4, 16))),
        ("type 0", to_tunnel(&message(0, 148))),
        ("type 5", to_tunnel(&message(5, 64))),
        ("reserved bytes", to_tunnel(&reserved)),
        ("IKE's four zeros", to_tunnel(&[0; 32])),
        ("a NAT keepalive of IPsec", to_tunnel(&[0xff])),
        ("an empty payload", to_tunnel(&[])),
    ];
    (named(passes), named(refused))
}

fn messages_of_both() -> (Named, Named) {
    let [(mut passes, mut refused), (passes6, refused6)] = Family::BOTH.map(messages);
    passes.extend(passes6);
    refused.extend(refused6);
    (passes, refused)
}

fn tc_guard() -> Config {
    Config { flags: topology::gateway().flags | CONFIG_TC_GUARD, ..topology::gateway() }
}

/// Returns the guard's two hooks for both families: configuration, and the action for a packet that passes.
fn both_guards() -> impl Iterator<Item = (Family, (Hook, Config, u32))> {
    let guards = [(Hook::UplinkXdp, topology::gateway(), 2), (Hook::UplinkIngress, tc_guard(), u32::MAX)];
    Family::BOTH.into_iter().flat_map(move |family| guards.map(|guard| (family, guard)))
}

#[test]
fn xdp_drops_packets_that_are_not_wireguard() {
    require_root!();
    let (passes, refused) = messages_of_both();
    let mut cases: Vec<Case> = passes.into_iter().map(|(name, packet)| Case::new(name, packet).xdp_passes()).collect();
    cases.extend(
        refused.into_iter().map(|(name, packet)| Case::new(name, packet).xdp_dropped(NONE, Verdict::DropNotWireguard)),
    );
    check(&Dataplane::load(topology::gateway()), Hook::UplinkXdp, &cases);
}

#[test]
fn tc_drops_packets_that_are_not_wireguard_without_xdp() {
    require_root!();
    let (passes, refused) = messages_of_both();
    let mut cases: Vec<Case> = passes.into_iter().map(|(name, packet)| Case::new(name, packet)).collect();
    cases.extend(
        refused.into_iter().map(|(name, packet)| Case::new(name, packet).dropped(NONE, Verdict::DropNotWireguard)),
    );
    for family in Family::BOTH {
        let inner = udp(family, MEMBERS, EDGES);
        let good = overlay(MEMBER, ME, inner.overlay_frame());
        cases.push(Case::new(format!("{family:?}: overlay from a node of the pool"), good.frame()));
        let outsider = Overlay { from: OUTSIDER, ..good.clone() };
        cases.push(
            Case::new(format!("{family:?}: from outside the pool"), outsider.frame())
                .dropped(NONE, Verdict::DropOuterNotInPool),
        );
        let elsewhere = Overlay { to: GATEWAY, ..outsider };
        cases.push(Case::new(format!("{family:?}: from outside the pool to another node"), elsewhere.frame()));
    }
    for family in Family::BOTH {
        let data = to_tunnel(family, &message(4, 2 * 1312));
        cases.push(Case::new(format!("{family:?}: an aggregate of data"), data).aggregate(2, 1312));
    }
    check(&Dataplane::load(tc_guard()), Hook::UplinkIngress, &cases);
}

/// Returns an initiation with arbitrary content and the MAC of a message to the owner of the key (whitepaper §5.4.4),
/// made with a crate and not with Raven's code.
fn initiation_for(public: &[u8; 32], number: u8) -> Vec<u8> {
    use blake2::{
        Blake2s256, Blake2sMac, Digest,
        digest::{Mac, consts::U16},
    };
    let mut initiation: Vec<u8> = (0..148u8).map(|n| n.wrapping_mul(31).wrapping_add(number)).collect();
    initiation[..4].copy_from_slice(&[1, 0, 0, 0]);
    let key = Blake2s256::new().chain_update(b"mac1----").chain_update(public).finalize();
    let mac = Blake2sMac::<U16>::new_from_slice(&key).expect("32 bytes").chain_update(&initiation[..116]).finalize();
    initiation[116..132].copy_from_slice(&mac.into_bytes());
    initiation
}

#[test]
fn initiations_for_another_key_are_dropped_and_count_for_no_limit() {
    require_root!();
    let (own, other) = ([0xa7; 32], [0xa8; 32]);
    for (family, (hook, config, pass)) in both_guards() {
        let mut dataplane = Dataplane::load(config);
        dataplane.set_handshake_key(&own);
        let run = |payload: &[u8]| dataplane.run(hook, &to_tunnel(family, payload), Context::default()).action == pass;
        for number in 0..20 {
            assert!(run(&initiation_for(&own, number)), "a valid initiation, {number}");
        }
        // One bit of each byte that the MAC covers, and of the MAC. The second MAC (of a cookie) is WireGuard's affair.
        let valid = initiation_for(&own, 0);
        for at in 4..148 {
            let mut changed = valid.clone();
            changed[at] ^= 1 << (at % 8);
            assert_eq!(run(&changed), at >= 132, "byte {at}");
        }
        let before = dataplane.counters()[&(NONE, Verdict::DropWrongKey)].packets;
        assert_eq!(before, 128);
        // A flood from the address of a peer does not keep the peer from starting a session.
        let flood = 10 * MAX_HANDSHAKES;
        let passed = (0..flood).filter(|n| run(&initiation_for(&other, *n as u8))).count();
        assert_eq!(passed, 0);
        assert!(run(&valid), "the peer's own initiation must pass");
        let after = dataplane.counters()[&(NONE, Verdict::DropWrongKey)].packets;
        assert_eq!(after, before + flood);
        // GRO merges messages of one length, and the first one is checked.
        if hook == Hook::UplinkIngress {
            let aggregate = Context { gso_size: 148, gso_segs: 2 };
            let merged = |first: &[u8]| to_tunnel(family, &[first, &valid].concat());
            assert_eq!(dataplane.run(hook, &merged(&valid), aggregate).action, pass);
            assert_ne!(dataplane.run(hook, &merged(&initiation_for(&other, 0)), aggregate).action, pass);
        }
        // Other messages have no such MAC, or are bound to a session.
        for (kind, len) in [(2, 92), (3, 64), (4, 1312)] {
            assert!(run(&message(kind, len)), "type {kind}");
        }
    }
}

#[test]
fn handshake_flood_is_dropped_and_other_sources_pass() {
    require_root!();
    for (family, (hook, config, pass)) in both_guards() {
        let dataplane = Dataplane::load(config);
        let initiation = |source| datagram(family, source, ME, TUNNEL_PORT, &message(1, 148));
        let run = |source| dataplane.run(hook, &initiation(source), Context::default()).action == pass;
        let total = 10 * MAX_HANDSHAKES;
        // A host has many IPv6 addresses.
        let hosts = if family == Family::V6 { 3 } else { 1 };
        let passed = (0..total).filter(|n| run([10, 0, 0, 97 + (n % hosts) as u8])).count() as u64;
        // The flood may span two windows.
        assert!((MAX_HANDSHAKES..=2 * MAX_HANDSHAKES).contains(&passed), "{passed} of {total} passed");
        assert!(run([203, 0, 113, 77]), "an initiation from another address must pass");
        let dropped = dataplane.counters()[&(NONE, Verdict::DropHandshakeFlood)].packets;
        assert_eq!(dropped, total - passed);
    }
}

#[test]
fn dropped_packets_are_sampled() {
    require_root!();
    let mut dataplane = Dataplane::load(topology::gateway());
    let outsider =
        Overlay { from: OUTSIDER, ..overlay(MEMBER, ME, udp(Family::V4, MEMBERS, EDGES).overlay_frame()) }.frame();
    dataplane.run(Hook::UplinkXdp, &outsider, Context::default());
    let samples = dataplane.samples();
    assert_eq!(samples.len(), 1, "{samples:?}");
    let sample = samples[0];
    assert_eq!(Verdict::from_number(sample.verdict), Some(Verdict::DropOuterNotInPool));
    assert_eq!((sample.source[..4].to_vec(), sample.destination[..4].to_vec()), (OUTSIDER.to_vec(), ME.to_vec()));
    assert_eq!(
        (sample.ethertype, sample.protocol, sample.destination_port),
        (ETH_P_IP, IPPROTO_UDP, 4472u16.to_be_bytes())
    );
    assert_eq!(sample.len as usize, outsider.len());

    let garbage = to_tunnel(Family::V6, b"garbage");
    let sampled = || {
        dataplane.run(Hook::UplinkXdp, &garbage, Context::default());
        dataplane.samples()
    };
    // The samples before have used up the time of some CPU.
    let samples =
        std::iter::repeat_with(sampled).take(1_000_000).find(|samples| !samples.is_empty()).expect("a sample");
    assert_eq!(samples[0].ethertype, ETH_P_IPV6, "{samples:?}");
    assert_eq!((samples[0].source, samples[0].destination), (node6(OUTSIDER), node6(ME)));
    assert_eq!(samples[0].destination_port, TUNNEL_PORT.to_be_bytes());

    // A flood of drops yields few samples, but all drops are counted.
    let many = 5_000;
    (0..many).for_each(|_| drop(dataplane.run(Hook::UplinkXdp, &outsider, Context::default())));
    let samples = dataplane.samples().len();
    assert!(samples < many / 2, "{samples} samples of {many} drops");
    assert_eq!(dataplane.counters()[&(NONE, Verdict::DropOuterNotInPool)].packets, many as u64 + 1);
}

#[test]
fn tc_sample_contains_inner_packet() {
    require_root!();
    let mut dataplane = Dataplane::load(topology::member());
    let packet = udp(Family::V6, MEMBERS, EDGES);
    dataplane.run(Hook::OverlayEgress, &packet.frame(), Context::default());
    let samples = dataplane.samples();
    assert_eq!(samples.len(), 1, "{samples:?}");
    assert_eq!(Verdict::from_number(samples[0].verdict), Some(Verdict::DropSourceNotMine));
    assert_eq!((samples[0].source, samples[0].destination), (MEMBERS.pod6(), EDGES.pod6()));
}
