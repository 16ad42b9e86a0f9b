//! Mutated packets by the million: whatever they are, nothing is forwarded to an address that is in no table, and
//! every packet of a program that counts is counted once. Always the same ones: a failure names its number.

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
    wire::Wire,
    world::{self, EDGES, FARS, KUBELET, LOCAL, ME, MEMBER, MEMBERS, MINE, NOBODYS, Net, REMOTE, TUNNEL_PORT},
};

/// Per program.
const PACKETS: u64 = 10_000_000;
/// Also per program: what a slow machine stops at, seconds; `RAVEN_GARBAGE_SECONDS` sets another number.
const SECONDS: u64 = 30;
/// Fewer would show nothing.
const AT_LEAST: u64 = 100_000;

/// The packets' numbers, until there are enough or time is up.
fn numbers() -> impl Iterator<Item = u64> {
    let seconds = std::env::var("RAVEN_GARBAGE_SECONDS").ok().and_then(|s| s.parse().ok()).unwrap_or(SECONDS);
    let end = Instant::now() + Duration::from_secs(seconds);
    (0..PACKETS).take_while(move |number| number % 1024 != 0 || *number < AT_LEAST || Instant::now() < end)
}

/// A program, and what tells whether it forwarded a packet.
struct Target {
    hook: Hook,
    config: Config,
    /// Good packets to start from.
    seeds: Vec<Vec<u8>>,
    /// Where the (inner) IP header is, and where its Ethernet type, if it has one: else the version says the family.
    l3: usize,
    ethertype: usize,
    /// True if the program sent the packet on, into the overlay or a tunnel.
    forwarded: fn(&[u8], &Ran) -> bool,
    /// True if this program counts every packet.
    counts_all: bool,
}

#[test]
fn no_mutated_packet_is_forwarded_to_an_address_in_no_table() {
    require_root!();
    let before = kernel_log::complaints().expect("the kernel's log");
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
        // Not one: then the test would show nothing.
        println!("{}: {packets} mutated packets, {forwarded} forwarded, each to where it may", target.hook.program());
        assert!((packets / 100..packets).contains(&forwarded), "{}: {forwarded} forwarded", target.hook.program());
        let counted = dataplane.counters().values().fold(Count::default(), |a, b| Count { packets: a.packets + b.packets, ..a }).packets;
        if target.counts_all {
            assert_eq!(counted, packets, "{}", target.hook.program());
        }
    }
    assert_eq!(kernel_log::complaints().expect("the kernel's log"), before, "the kernel complains");
}

fn targets() -> Vec<Target> {
    let by = |build: &dyn Fn(Family, Net) -> Vec<u8>, to: &[Net]| -> Vec<Vec<u8>> {
        Family::BOTH.iter().flat_map(|family| to.iter().map(|to| build(*family, *to))).collect()
    };
    let redirected = |_: &[u8], ran: &Ran| ran.action == TC_REDIRECT;
    vec![
        Target {
            hook: Hook::OverlayEgress,
            config: world::ordinary(),
            seeds: by(&|family, to| tcp(family, MINE, to, SYN, &[1, 2, 4, 5, 180, 1, 1, 0]).frame(), &[EDGES, MEMBERS, NOBODYS]),
            l3: 14,
            ethertype: 12,
            forwarded: |_, ran| ran.action == TC_UNSPEC,
            counts_all: true,
        },
        Target {
            hook: Hook::UplinkXdp,
            config: world::gateway(),
            seeds: by(&|family, to| overlay(MEMBER, ME, udp(family, MEMBERS, to).overlay_frame()).frame(), &[EDGES, MEMBERS, NOBODYS]),
            l3: 64,
            ethertype: 62,
            forwarded: |packet, ran| ran.packet.len() < packet.len(),
            counts_all: false,
        },
        Target {
            hook: Hook::TunnelIngress,
            config: world::gateway(),
            seeds: by(&|family, to| udp(family, EDGES, to).bytes(), &[MEMBERS, FARS, MINE, NOBODYS]),
            l3: 0,
            // By the source address: see `Net`.
            ethertype: 12,
            forwarded: redirected,
            counts_all: true,
        },
    ]
}

#[test]
fn no_mutated_packet_is_redirected_by_the_other_programs() {
    require_root!();
    let frames: Vec<Vec<u8>> = Family::BOTH.iter().map(|family| udp(*family, MEMBERS, EDGES).frame()).collect();
    let packets = Family::BOTH.iter().map(|family| tcp(*family, MINE, EDGES, SYN, &[1, 2, 4, 5, 180, 1, 1, 0]).bytes()).collect();
    // For the guard, as on a node without native XDP: of a member, and for the tunnel's port.
    let lan = |ports| Overlay { ports, ..overlay(MEMBER, ME, frames[0].clone()) }.frame();
    let lan = vec![lan([50_000, OVERLAY_PORT]), lan([50_000, TUNNEL_PORT])];
    // The first two without metadata, as everything in a test run: of the second no more than its first check is met
    // here, the rest comes by wire (`overlay_ingress`). The third has no redirect at all.
    for (hook, seeds) in [(Hook::UplinkIngress, lan), (Hook::OverlayIngress, frames), (Hook::TunnelEgress, packets)] {
        let gateway = world::gateway();
        let dataplane = Dataplane::load(Config { flags: gateway.flags | CONFIG_TC_GUARD, ..gateway });
        let mut random = Random(0x7261_7665_6e22);
        let (mut passed, mut packets) = (0, 0);
        for number in numbers() {
            let packet = mutated(&seeds, &mut random);
            let ran = dataplane.run(hook, &packet, Context::default());
            assert!([TC_UNSPEC, TC_SHOT].contains(&ran.action), "{}: packet {number}: {packet:02x?} → {ran:02x?}", hook.program());
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

/// Of `overlay_ingress`, by wire: every packet takes its way through the kernel, which is slower than a test run.
const BY_WIRE: u64 = 2_000_000;
/// Sent before what came out is looked at; less than any queue on the way holds.
const BATCH: u64 = 128;

#[test]
fn no_mutated_overlay_packet_enters_the_tunnel_but_from_and_to_where_it_may() {
    require_root!();
    let before = kernel_log::complaints().expect("the kernel's log");
    let wire = Wire::new(world::gateway(), &[Hook::OverlayIngress], 1700);
    let (lan, tunnel) = (wire.lan_sender(), wire.on_node("raven-wg0"));
    let seeds: Vec<Vec<u8>> = Family::BOTH
        .iter()
        .flat_map(|family| [EDGES, MEMBERS, NOBODYS].map(|to| udp(*family, MEMBERS, to).overlay_frame()))
        .chain([tcp(Family::V4, MEMBERS, KUBELET, SYN, &[]).overlay_frame()])
        .collect();
    let mut random = Random(0x7261_7665_6e23);
    let (mut sent, mut entered) = (0, 0);
    for batch in numbers().take_while(|number| number * BATCH < BY_WIRE) {
        let counted = wire.counted("a batch", || {
            for _ in 0..BATCH {
                // From the address of `raven0` itself the VXLAN device takes nothing.
                let other = |frame: &Vec<u8>| frame[6..12] != OVERLAY_MAC;
                let frame = std::iter::repeat_with(|| mutated(&seeds, &mut random)).find(other).expect("most are");
                lan.send(&overlay(MEMBER, ME, frame).frame());
                sent += 1;
            }
        });
        let packets: u64 = counted.values().map(|count| count.packets).sum();
        assert_eq!(packets, BATCH, "batch {batch}: every packet is counted once: {counted:?}");
        for packet in tunnel.drain() {
            entered += 1;
            let (source, destination) = match packet[0] >> 4 {
                4 => (packet[12..15] == MEMBERS.prefix4()[..3], REMOTE.iter().any(|(net, _)| packet[16..19] == net.prefix4()[..3])),
                6 => (packet[8..16] == MEMBERS.prefix6()[..8], REMOTE.iter().any(|(net, _)| packet[24..32] == net.prefix6()[..8])),
                _ => (false, false),
            };
            assert!(source && destination, "batch {batch}: {packet:02x?}");
        }
    }
    println!("overlay_ingress: {sent} mutated packets by wire, {entered} entered the tunnel, each from and to where it may");
    assert!((sent / 100..sent).contains(&entered), "{entered} of {sent}");
    assert_eq!(kernel_log::complaints().expect("the kernel's log"), before, "the kernel complains");
}

/// The oracle: is the destination of what the kernel must have taken this for in a table that this program forwards by?
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

/// One of the good packets with a few bytes changed, cut or continued.
fn mutated(seeds: &[Vec<u8>], random: &mut Random) -> Vec<u8> {
    let mut packet = seeds[random.below(seeds.len())].clone();
    for _ in 0..random.below(5) {
        let at = random.below(packet.len());
        match random.below(4) {
            0 => packet[at] = random.below(256) as u8,
            1 => packet[at] ^= 1 << random.below(8),
            2 => packet[at] = [0, 1, 0x7f, 0xff][random.below(4)],
            // A test run refuses packets without a whole IP header at its place: those come by wire.
            _ => packet.truncate(at.max(14 + 40)),
        }
    }
    if random.below(16) == 0 {
        packet.extend((0..random.below(64)).map(|i| i as u8));
    }
    packet
}

/// SplitMix64 (public domain, Sebastiano Vigna).
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
