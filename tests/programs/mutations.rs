//! Tests with millions of mutated packets: none is forwarded to an address that is in no table, and programs count each
//! packet exactly once. The packets are the same in every run; a failure contains the packet's number.

use std::time::{Duration, Instant};

use raven_agent::bpf::Hook;
use raven_common::{
    OVERLAY_MAC, OVERLAY_PORT,
    tables::{CONFIG_TC_GUARD, Config, Count},
};
use raven_tests::{kernel_log, require_root};

use crate::{
    dataplane::{Context, Dataplane, Ran, TC_REDIRECT, TC_SHOT, TC_UNSPEC, XDP_DROP, XDP_PASS},
    packet::{Family, Overlay, SYN, overlay, tcp, udp},
    testbed::Testbed,
    topology::{self, EDGES, FARS, KUBELET, LOCAL, ME, MEMBER, MEMBERS, MINE, Net, REMOTE, TUNNEL_PORT, UNKNOWN},
};

/// Number of packets per program.
const PACKETS: u64 = 10_000_000;
/// Time limit per program in seconds, for slow machines. `RAVEN_GARBAGE_SECONDS` sets another one.
const SECONDS: u64 = 30;
/// Minimum number of packets per program, regardless of the time limit.
const AT_LEAST: u64 = 100_000;

/// Yields the packets' numbers until the number or time limit is reached.
fn numbers() -> impl Iterator<Item = u64> {
    let seconds = std::env::var("RAVEN_GARBAGE_SECONDS").ok().and_then(|s| s.parse().ok()).unwrap_or(SECONDS);
    let end = Instant::now() + Duration::from_secs(seconds);
    (0..PACKETS).take_while(move |number| number % 1024 != 0 || *number < AT_LEAST || Instant::now() < end)
}

/// A program under test, with the criterion for a forwarded packet.
struct Target {
    hook: Hook,
    config: Config,
    /// Valid packets that are mutated.
    seeds: Vec<Vec<u8>>,
    /// Offsets of the (inner) IP header and of its Ethernet type; without the latter, of the bytes that a test
    /// run uses for it.
    l3: usize,
    ethertype: usize,
    /// Reports whether the program forwarded the packet into the overlay or the tunnel.
    forwarded: fn(&[u8], &Ran) -> bool,
    /// Whether this program counts every packet.
    counts_all: bool,
}

#[test]
fn mutated_packets_are_forwarded_only_to_known_addresses() {
    require_root!();
    let before = kernel_log::complaints().expect("read the kernel log");
    for target in targets() {
        let dataplane = Dataplane::load(target.config);
        let mut random = Random(0x7261_7665_6e21);
        let (mut forwarded, mut packets) = (0, 0);
        for number in numbers() {
            let packet = mutated(&target.seeds, &mut random);
            let ran = dataplane.run(target.hook, &packet, Context::default());
            let what = || format!("{}: packet {number}: {packet:02x?} → {ran:02x?}", target.hook.program());
            assert!([TC_UNSPEC, TC_SHOT, TC_REDIRECT, XDP_DROP, XDP_PASS].contains(&ran.action), "{}", what());
            packets += 1;
            if (target.forwarded)(&packet, &ran) {
                forwarded += 1;
                assert!(is_known(&packet, &target), "{}", what());
            }
        }
        // A sufficient share must be forwarded, or the test would prove nothing.
        println!(
            "{}: {packets} mutated packets, {forwarded} forwarded, all to allowed destinations",
            target.hook.program()
        );
        assert!((packets / 100..packets).contains(&forwarded), "{}: {forwarded} forwarded", target.hook.program());
        let counted = dataplane
            .counters()
            .values()
            .fold(Count::default(), |a, b| Count { packets: a.packets + b.packets, ..a })
            .packets;
        if target.counts_all {
            assert_eq!(counted, packets, "{}", target.hook.program());
        }
    }
    assert_eq!(kernel_log::complaints().expect("read the kernel log"), before, "new warnings in the kernel log");
}

fn targets() -> Vec<Target> {
    let by = |build: &dyn Fn(Family, Net) -> Vec<u8>, to: &[Net]| -> Vec<Vec<u8>> {
        Family::BOTH.iter().flat_map(|family| to.iter().map(|to| build(*family, *to))).collect()
    };
    let redirected = |_: &[u8], ran: &Ran| ran.action == TC_REDIRECT;
    vec![
        Target {
            hook: Hook::OverlayEgress,
            config: topology::member(),
            seeds: by(
                &|family, to| tcp(family, MINE, to, SYN, &[1, 2, 4, 5, 180, 1, 1, 0]).frame(),
                &[EDGES, MEMBERS, UNKNOWN],
            ),
            l3: 14,
            ethertype: 12,
            forwarded: |_, ran| ran.action == TC_UNSPEC,
            counts_all: true,
        },
        Target {
            hook: Hook::UplinkXdp,
            config: topology::gateway(),
            seeds: by(
                &|family, to| overlay(MEMBER, ME, udp(family, MEMBERS, to).overlay_frame()).frame(),
                &[EDGES, MEMBERS, UNKNOWN],
            ),
            l3: 64,
            ethertype: 62,
            forwarded: |packet, ran| ran.packet.len() < packet.len(),
            counts_all: false,
        },
        Target {
            hook: Hook::TunnelIngress,
            config: topology::gateway(),
            seeds: by(&|family, to| udp(family, EDGES, to).bytes(), &[MEMBERS, FARS, MINE, UNKNOWN]),
            l3: 0,
            // Bytes of the source address; see `Net`.
            ethertype: 12,
            forwarded: redirected,
            counts_all: true,
        },
    ]
}

#[test]
fn mutated_packets_are_not_redirected_by_other_programs() {
    require_root!();
    let frames: Vec<Vec<u8>> = Family::BOTH.iter().map(|family| udp(*family, MEMBERS, EDGES).frame()).collect();
    let packets =
        Family::BOTH.iter().map(|family| tcp(*family, MINE, EDGES, SYN, &[1, 2, 4, 5, 180, 1, 1, 0]).bytes()).collect();
    // For the guard, as on a node without native XDP: from a member, and to the tunnel's port.
    let lan = |ports| Overlay { ports, ..overlay(MEMBER, ME, frames[0].clone()) }.frame();
    let lan = vec![lan([50_000, OVERLAY_PORT]), lan([50_000, TUNNEL_PORT])];
    // In a test run, packets have no metadata, so OverlayIngress performs only its first check here; the rest is tested
    // with devices. TunnelEgress has no redirect at all.
    for (hook, seeds) in [(Hook::UplinkIngress, lan), (Hook::OverlayIngress, frames), (Hook::TunnelEgress, packets)] {
        let gateway = topology::gateway();
        let dataplane = Dataplane::load(Config { flags: gateway.flags | CONFIG_TC_GUARD, ..gateway });
        let mut random = Random(0x7261_7665_6e22);
        let (mut passed, mut packets) = (0, 0);
        for number in numbers() {
            let packet = mutated(&seeds, &mut random);
            let ran = dataplane.run(hook, &packet, Context::default());
            assert!(
                [TC_UNSPEC, TC_SHOT].contains(&ran.action),
                "{}: packet {number}: {packet:02x?} → {ran:02x?}",
                hook.program()
            );
            assert_eq!(ran.packet.len(), packet.len(), "{}: packet {number}: {packet:02x?}", hook.program());
            packets += 1;
            passed += u64::from(ran.action == TC_UNSPEC);
        }
        println!("{}: {packets} mutated packets, {passed} passed, none redirected", hook.program());
        let expected = match hook {
            Hook::OverlayIngress => 0..1,
            _ => packets / 100..packets,
        };
        assert!(expected.contains(&passed), "{}: {passed} passed", hook.program());
    }
}

/// Number of packets for `overlay_ingress` on devices, where each one takes the kernel's path, slower than a test run.
const ON_DEVICES: u64 = 2_000_000;
/// Number of packets sent before the results are read; below the length of any queue on the path.
const BATCH: u64 = 128;

#[test]
fn mutated_overlay_packets_enter_the_tunnel_only_with_allowed_addresses() {
    require_root!();
    let before = kernel_log::complaints().expect("read the kernel log");
    let testbed = Testbed::new(topology::gateway(), &[Hook::OverlayIngress], 1700);
    let (lan, tunnel) = (testbed.lan_sender(), testbed.on_node("raven-wg0"));
    let seeds: Vec<Vec<u8>> = Family::BOTH
        .iter()
        .flat_map(|family| [EDGES, MEMBERS, UNKNOWN].map(|to| udp(*family, MEMBERS, to).overlay_frame()))
        .chain([tcp(Family::V4, MEMBERS, KUBELET, SYN, &[]).overlay_frame()])
        .collect();
    let mut random = Random(0x7261_7665_6e23);
    let (mut sent, mut entered) = (0, 0);
    for batch in numbers().take_while(|number| number * BATCH < ON_DEVICES) {
        let counted = testbed.counted("a batch", || {
            for _ in 0..BATCH {
                // The VXLAN device drops frames from its own address.
                let other = |frame: &Vec<u8>| frame[6..12] != OVERLAY_MAC;
                let frame =
                    std::iter::repeat_with(|| mutated(&seeds, &mut random)).find(other).expect("an infinite iterator");
                lan.send(&overlay(MEMBER, ME, frame).frame());
                sent += 1;
            }
        });
        let packets: u64 = counted.values().map(|count| count.packets).sum();
        assert_eq!(packets, BATCH, "batch {batch}: every packet is counted once: {counted:?}");
        for packet in tunnel.drain() {
            entered += 1;
            let (source, destination) = match packet[0] >> 4 {
                4 => (
                    packet[12..15] == MEMBERS.prefix4()[..3],
                    REMOTE.iter().any(|(net, _)| packet[16..19] == net.prefix4()[..3]),
                ),
                6 => (
                    packet[8..16] == MEMBERS.prefix6()[..8],
                    REMOTE.iter().any(|(net, _)| packet[24..32] == net.prefix6()[..8]),
                ),
                _ => (false, false),
            };
            assert!(source && destination, "batch {batch}: {packet:02x?}");
        }
    }
    println!(
        "overlay_ingress: {sent} mutated packets on devices, {entered} entered the tunnel, all from and to allowed addresses"
    );
    assert!((sent / 100..sent).contains(&entered), "{entered} of {sent}");
    assert_eq!(kernel_log::complaints().expect("read the kernel log"), before, "new warnings in the kernel log");
}

/// The oracle: reports whether the destination, as parsed by the kernel, is in a table by which this program forwards.
fn is_known(packet: &[u8], target: &Target) -> bool {
    let ip = &packet[target.l3..];
    let remote = REMOTE.iter().map(|(net, _)| *net);
    let local = LOCAL.iter().map(|(net, _)| *net).filter(|_| target.hook == Hook::TunnelIngress);
    remote.chain(local).any(|net| match packet[target.ethertype..target.ethertype + 2] {
        [0x08, 0x00] => ip[16..19] == net.prefix4()[..3],
        [0x86, 0xdd] => ip[24..32] == net.prefix6()[..8],
        _ => false,
    })
}

/// Returns one of the valid packets with a few bytes changed, removed or appended.
fn mutated(seeds: &[Vec<u8>], random: &mut Random) -> Vec<u8> {
    let mut packet = seeds[random.below(seeds.len())].clone();
    for _ in 0..random.below(5) {
        let at = random.below(packet.len());
        match random.below(4) {
            0 => packet[at] = random.below(256) as u8,
            1 => packet[at] ^= 1 << random.below(8),
            2 => packet[at] = [0, 1, 0x7f, 0xff][random.below(4)],
            // A test run rejects packets without a complete IP header; tests with devices cover those.
            _ => packet.truncate(at.max(14 + 40)),
        }
    }
    if random.below(16) == 0 {
        packet.extend((0..random.below(64)).map(|i| i as u8));
    }
    packet
}

/// A SplitMix64 generator (public domain, Sebastiano Vigna).
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ z >> 31) % bound as u64) as usize
    }
}
