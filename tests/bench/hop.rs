//! A gateway node in isolation between a generator and a sink, so that its hop is the only bottleneck.
//!
//! ```text
//!   lan (generator, CPU 0)          gateway (its NAPI thread, CPU 1)
//!     lan0 ─────────────────────────► eth0      raven0      raven-wg0 ┤ counted and dropped
//!     feed0 ────────────────────────► feed1 → tun0          eth0      ┤
//! ```
//!
//! Frames are created by XDP live frames of `BPF_PROG_TEST_RUN`. The hop ends where WireGuard or the network card would
//! take the packet: a TC program at the egress of `raven-wg0` or `eth0` counts and drops it. (A veth to a sink would
//! wake a thread on the other core, which in a virtual machine costs more than the whole hop.) The receiving veth has
//! threaded NAPI, and packets are divided by the CPU time of that thread and of its core's softirqs, which excludes the
//! generator and other processes of the machine.
//!
//! WireGuard itself is excluded. Towards the tunnel, `raven-wg0` is a veth. In the other direction,
//! packets come from an L3 device without Ethernet header, as from WireGuard: VXLAN-GPE, whose own cost is
//! measured separately and subtracted.

use std::{
    fs,
    path::Path,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use aya::{
    Ebpf, EbpfLoader, TestRun, TestRunOptions,
    maps::{Array, HashMap, LpmTrie, MapData, PerCpuArray, PerCpuValues, lpm_trie::Key},
    programs::{SchedClassifier, TcAttachType, TestRunAttrs, Xdp, XdpMode, tc},
    util::nr_cpus,
};
use nix::{
    sched::{CloneFlags, CpuSet, sched_setaffinity, setns},
    unistd::Pid,
};
use raven_agent::bpf::Hook;
use raven_common::{
    generator::{FRAME_LEN, Generator, Sender},
    tables::{CONFIG_RELAY, CONFIG_TUNNEL_REDIRECT, Config, Local, NODE_IS_GATEWAY, Node, Remote},
};

/// Address of the gateway node.
pub(crate) const GATEWAY: [u8; 4] = [10, 9, 0, 1];
/// Address of the pool's other node, which sends and receives.
pub(crate) const MEMBER: [u8; 4] = [10, 9, 0, 2];
/// Address of the other node's pod.
pub(crate) const POD: [u8; 4] = [10, 244, 2, 10];
/// First remote prefix, a /28; the others follow consecutively.
pub(crate) const REMOTE: [u8; 4] = [10, 128, 0, 0];
const REMOTE_LEN: u32 = 28;
const REMOTE_STEP: u32 = 16;
/// Number of prefixes that the generator cycles through: as many flows as a busy site has,
/// but within conntrack's limit.
const TURNS: u32 = 1024;
/// UDP port of the L3 device.
const FEED_PORT: u16 = 4790;

const LAN_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const UPLINK_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];
const FEED_MAC: [u8; 6] = [2, 0, 0, 0, 0, 3];

/// Direction of the packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    /// From a node of the pool into the tunnel.
    ToTunnel,
    /// From the tunnel to a node of the pool.
    ToOverlay,
}

/// A gateway node with generator and sink. Dropping it removes the namespaces.
pub(crate) struct Hop {
    names: [String; 3],
    generator: Ebpf,
    prefixes: u32,
}

/// Result of one measurement.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sample {
    /// Number of packets that arrived.
    pub packets: u64,
    /// CPU time of the hop.
    pub cpu: Duration,
}

impl Sample {
    /// Returns the CPU time per packet in nanoseconds.
    pub(crate) fn nanoseconds(&self) -> f64 {
        self.cpu.as_nanos() as f64 / self.packets.max(1) as f64
    }
}

fn sh(script: &str) -> Result<String> {
    let output = Command::new("sh").args(["-ec", script]).output().context("run sh")?;
    ensure!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

impl Hop {
    /// Creates namespaces and links, for `prefixes` remote prefixes.
    pub(crate) fn new(object: &Path, prefixes: u32) -> Result<Self> {
        let tag = format!("rvb{:x}", std::process::id() & 0xffff);
        let names = ["lan", "gw", "far"].map(|n| format!("{tag}-{n}"));
        let generator = EbpfLoader::new().load_file(object).with_context(|| format!("load {}", object.display()))?;
        let mut hop = Self { names, generator, prefixes };
        hop.connect()?;
        for device in ["lan0", "feed0"] {
            hop.xdp_of_bench("pass", "lan", device)?;
        }
        for device in ["raven-wg0", "eth0"] {
            hop.swallow(device, TcAttachType::Egress)?;
        }
        hop.load_generator()?;
        Ok(hop)
    }

    /// Returns the name of a namespace by its short name.
    fn ns(&self, short: &str) -> &str {
        let index = ["lan", "gw", "far"].iter().position(|n| *n == short).unwrap_or(0);
        &self.names[index]
    }

    /// Runs a script inside a namespace, with a separate mount of /sys.
    pub(crate) fn inside(&self, ns: &str, script: &str) -> Result<String> {
        let path = format!("/run/netns/{}", self.ns(ns));
        sh(&format!(
            "nsenter --net={path} unshare -m --propagation private sh -ec 'mount -t sysfs sysfs /sys; {script}'"
        ))
    }

    fn connect(&self) -> Result<()> {
        let [lan, gw, far] = &self.names;
        for ns in &self.names {
            sh(&format!("ip netns add {ns}; ip -n {ns} link set lo up"))?;
        }
        let mac = |m: [u8; 6]| m.map(|b| format!("{b:02x}")).join(":");
        let ip4 = |a: [u8; 4]| std::net::Ipv4Addr::from(a).to_string();
        sh(&format!(
            "ip -n {lan} link add lan0 address {lan_mac} numrxqueues 1 numtxqueues 1 type veth peer name eth0 netns {gw} address {up} numrxqueues 1 numtxqueues 1
             ip -n {lan} link add feed0 address {lan_mac} numrxqueues 1 numtxqueues 1 type veth peer name feed1 netns {gw} address {feed} numrxqueues 1 numtxqueues 1
             ip -n {far} link add far0 numrxqueues 1 numtxqueues 1 type veth peer name raven-wg0 netns {gw} numrxqueues 1 numtxqueues 1
             for d in lan0 feed0; do ip -n {lan} link set $d up; done
             ip -n {far} link set far0 up
             for d in eth0 feed1 raven-wg0; do ip -n {gw} link set $d up; done
             ip -n {gw} addr add {me}/24 dev eth0
             ip -n {gw} addr add 10.9.1.1/24 dev feed1
             ip -n {gw} addr add 10.9.2.1/24 dev raven-wg0
             ip -n {gw} neigh replace {member} lladdr {lan_mac} dev eth0 nud permanent
             ip -n {gw} neigh replace 10.9.2.2 lladdr 02:00:00:00:00:09 dev raven-wg0 nud permanent
             ip -n {gw} link add tun0 type vxlan dstport {FEED_PORT} gpe external
             ip -n {gw} link set tun0 up",
            lan_mac = mac(LAN_MAC),
            up = mac(UPLINK_MAC),
            feed = mac(FEED_MAC),
            me = ip4(GATEWAY),
            member = ip4(MEMBER),
        ))?;
        self.inside(
            "gw",
            "sysctl -qw net.ipv4.ip_forward=1 net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.default.rp_filter=0
             for d in eth0 feed1 raven-wg0 tun0; do echo 0 > /proc/sys/net/ipv4/conf/$d/rp_filter; done
             for d in eth0 feed1; do ethtool -K $d gro on; echo 1 > /sys/class/net/$d/threaded; done",
        )?;
        Ok(())
    }

    /// Creates `raven0` as the agent does (collect metadata) or as upstream does (a plain VXLAN device).
    pub(crate) fn overlay_device(&self, metadata: bool) -> Result<()> {
        let kind = if metadata { "external" } else { "id 200 remote 10.9.0.2 local 10.9.0.1" };
        self.inside(
            "gw",
            &format!(
                "ip link del raven0 2>/dev/null || true
                 ip link add raven0 address 02:72:61:76:65:6e type vxlan {kind} dstport 4472 nolearning
                 ip link set raven0 mtu 1450 up; echo 0 > /proc/sys/net/ipv4/conf/raven0/rp_filter"
            ),
        )?;
        Ok(())
    }

    fn index(&self, ns: &str, device: &str) -> Result<u32> {
        within(self.ns(ns), || nix::net::if_::if_nametoindex(device).with_context(|| format!("device {device}")))
    }

    fn xdp_of_bench(&mut self, program: &str, ns: &str, device: &str) -> Result<()> {
        let ns = self.ns(ns).to_owned();
        let xdp: &mut Xdp = self
            .generator
            .program_mut(program)
            .with_context(|| format!("the object has no program {program}"))?
            .try_into()?;
        if xdp.fd().is_err() {
            xdp.load()?;
        }
        within(&ns, || {
            xdp.attach(device, XdpMode::Driver).map(drop).with_context(|| format!("attach {program} to {device}"))
        })
    }

    fn load_generator(&mut self) -> Result<()> {
        let xdp: &mut Xdp =
            self.generator.program_mut("generate").context("the object has no program generate")?.try_into()?;
        Ok(xdp.load()?)
    }

    /// Configures the generator for a direction.
    fn aim(&mut self, direction: Direction) -> Result<()> {
        let (device, frame, ip, address_at) = match direction {
            Direction::ToTunnel => {
                let inner = inner_packet(POD, REMOTE);
                ("lan0", overlay_frame(&inner), 64, 64 + 16)
            }
            Direction::ToOverlay => {
                let inner = inner_packet(REMOTE, POD);
                ("feed0", gpe_frame(&inner), 50, 50 + 12)
            }
        };
        let turns = self.prefixes.min(TURNS);
        let base = (u32::from_be_bytes(REMOTE) + 1).to_be_bytes();
        let generator = Generator {
            ifindex: self.index("lan", device)?,
            addresses: turns,
            stride: self.prefixes / turns * REMOTE_STEP,
            address_at,
            checksum_at: ip + 10,
            checksum: u16::from_be_bytes([frame[ip as usize + 10], frame[ip as usize + 11]]).into(),
            base,
            frame,
        };
        let mut map: Array<_, Generator> = self.generator.map_mut("GENERATOR").context("GENERATOR")?.try_into()?;
        Ok(map.set(0, generator, 0)?)
    }

    /// Resets the counters. Frames in flight of an earlier measurement are lost when its setup is removed.
    fn reset(&mut self) -> Result<()> {
        let mut sender: PerCpuArray<_, Sender> = self.generator.map_mut("SENDER").context("SENDER")?.try_into()?;
        sender.set(0, PerCpuValues::try_from(vec![Sender::default(); nr_cpus().map_err(|(_, error)| error)?])?, 0)?;
        let mut arrived: Array<_, u64> = self.generator.map_mut("ARRIVED").context("ARRIVED")?.try_into()?;
        Ok(arrived.set(0, 0, 0)?)
    }

    /// Sends for `time` and returns the packets counted and the CPU time of the hop's thread.
    pub(crate) fn measure(&mut self, direction: Direction, time: Duration) -> Result<Sample> {
        self.aim(direction)?;
        self.reset()?;
        let receiver = match direction {
            Direction::ToTunnel => "eth0",
            Direction::ToOverlay => "feed1",
        };
        let hop = Self::napi_of_gateway(receiver)?;
        pin(hop, 1)?;
        let stop = Arc::new(AtomicBool::new(false));
        let file = fs::File::open(format!("/run/netns/{}", self.ns("lan")))?;
        let xdp: &Xdp = self.generator.program("generate").context("generate")?.try_into()?;
        thread::scope(|scope| {
            let stopped = stop.clone();
            let sender = scope.spawn(move || -> Result<()> {
                setns(file, CloneFlags::CLONE_NEWNET)?;
                let mut cpu = CpuSet::new();
                cpu.set(0)?;
                sched_setaffinity(Pid::from_raw(0), &cpu)?;
                while !stopped.load(Ordering::Relaxed) {
                    let options = TestRunOptions {
                        data_in: Some(&[0; FRAME_LEN]),
                        repeat: 20_000,
                        attrs: TestRunAttrs::new().xdp_live_frames(64),
                        ..TestRunOptions::default()
                    };
                    xdp.test_run(options).context("send live frames")?;
                }
                Ok(())
            });
            let measured = self.observe(hop, time);
            stop.store(true, Ordering::Relaxed);
            sender.join().unwrap_or_else(|_| bail!("the generator panicked"))?;
            measured
        })
    }

    /// Measures arrived packets and CPU time while the generator runs, after a warm-up.
    fn observe(&self, hop: i32, time: Duration) -> Result<Sample> {
        thread::sleep(Duration::from_millis(150));
        // Softirq work of the hop runs in its thread or, under load, in this core's ksoftirqd.
        let softirqs = threads_named("ksoftirqd/1")?.into_iter().next().context("CPU 1 has no ksoftirqd")?;
        let cpu = || Ok::<_, anyhow::Error>(cpu_time(hop)? + cpu_time(softirqs)?);
        let (packets, before) = (self.arrived()?, cpu()?);
        thread::sleep(time);
        Ok(Sample { packets: self.arrived()? - packets, cpu: cpu()?.checked_sub(before).unwrap() })
    }

    /// Attaches a program to a device of the gateway node that counts and drops all packets.
    fn swallow(&mut self, device: &str, direction: TcAttachType) -> Result<()> {
        let ns = self.ns("gw").to_owned();
        let program: &mut SchedClassifier =
            self.generator.program_mut("swallow").context("the object has no program swallow")?.try_into()?;
        if program.fd().is_err() {
            program.load()?;
        }
        within(&ns, || {
            let _ = tc::qdisc_add_clsact(device);
            program.attach(device, direction).map(drop).with_context(|| format!("attach to {device}"))
        })
    }

    /// Drops all packets at the L3 device from now on, to measure the cost of what comes before it.
    pub(crate) fn end_at_feed(&mut self) -> Result<()> {
        self.swallow("tun0", TcAttachType::Ingress)
    }

    fn arrived(&self) -> Result<u64> {
        let map: Array<&MapData, u64> = self.generator.map("ARRIVED").context("ARRIVED")?.try_into()?;
        Ok(map.get(&0, 0)?)
    }

    /// Returns the NAPI thread of a device of the gateway node.
    fn napi_of_gateway(device: &str) -> Result<i32> {
        // Threads are named napi/DEVICE-ID. Devices of other namespaces may have the same name; the newest thread
        // is the right one.
        napi_threads(device)?.into_iter().max().with_context(|| format!("{device} has no NAPI thread"))
    }

    /// Attaches Raven's programs to the gateway node and fills their tables.
    pub(crate) fn programs(&self, hooks: &[(Hook, &str)], flags: u32) -> Result<Programs> {
        let mut ebpf = EbpfLoader::new().load(raven_agent::bpf::object())?;
        let config = Config {
            node: GATEWAY,
            uplink_ifindex: self.index("gw", "eth0")?,
            overlay_ifindex: self.index("gw", "raven0")?,
            tunnel_ifindex: self.index("gw", "raven-wg0")?,
            tunnel_mtu: 1420,
            flags: flags | CONFIG_TUNNEL_REDIRECT | CONFIG_RELAY,
            tunnel_port: 4500,
            generation: 1,
        };
        let mut map: Array<_, Config> = ebpf.map_mut("CONFIG").context("CONFIG")?.try_into()?;
        map.set(0, config, 0)?;
        let mut nodes: HashMap<_, [u8; 4], Node> = ebpf.map_mut("NODES").context("NODES")?.try_into()?;
        nodes.insert(MEMBER, Node { flags: 0 }, 0)?;
        nodes.insert(GATEWAY, Node { flags: NODE_IS_GATEWAY }, 0)?;
        let mut local: LpmTrie<_, [u8; 4], Local> = ebpf.map_mut("LOCAL4").context("LOCAL4")?.try_into()?;
        local.insert(&Key::new(24, [10, 244, 2, 0]), Local { node: MEMBER }, 0)?;
        local.insert(&Key::new(24, [10, 244, 1, 0]), Local { node: GATEWAY }, 0)?;
        let mut remote: LpmTrie<_, [u8; 4], Remote> = ebpf.map_mut("REMOTE4").context("REMOTE4")?.try_into()?;
        for prefix in self.remote_prefixes() {
            remote.insert(&Key::new(REMOTE_LEN, prefix), Remote { gateway: 7, via: [0; 4] }, 0)?;
        }
        within(self.ns("gw"), || hooks.iter().try_for_each(|(hook, device)| attach(&mut ebpf, *hook, device)))?;
        Ok(Programs { _ebpf: ebpf })
    }

    /// Returns the remote prefixes in network order.
    pub(crate) fn remote_prefixes(&self) -> impl Iterator<Item = [u8; 4]> {
        let base = u32::from_be_bytes(REMOTE);
        (0..self.prefixes).map(move |n| (base + n * REMOTE_STEP).to_be_bytes())
    }

    /// Adds routes to the remote prefixes by `raven-wg0` in a table, and back to the pod by `raven0`.
    pub(crate) fn routes(&self, table: &str) -> Result<()> {
        let mut batch = String::new();
        for prefix in self.remote_prefixes() {
            batch += &format!(
                "route replace {}/{REMOTE_LEN} via 10.9.2.2 dev raven-wg0 table {table}\n",
                std::net::Ipv4Addr::from(prefix)
            );
        }
        batch += "route replace 10.244.2.0/24 via 240.9.0.2 dev raven0 onlink\nneigh replace 240.9.0.2 lladdr 02:72:61:76:65:6f dev raven0 nud permanent\n";
        let file = std::env::temp_dir().join(format!("{}.routes", self.ns("gw")));
        fs::write(&file, batch)?;
        let result = sh(&format!("ip -n {} -batch {}", self.ns("gw"), file.display()));
        fs::remove_file(&file)?;
        result.map(drop)
    }
}

impl Drop for Hop {
    fn drop(&mut self) {
        for ns in &self.names {
            let _ = sh(&format!("ip netns del {ns}"));
        }
    }
}

/// Attached programs; dropping the value detaches them.
pub(crate) struct Programs {
    _ebpf: Ebpf,
}

fn attach(ebpf: &mut Ebpf, hook: Hook, device: &str) -> Result<()> {
    let program = ebpf.program_mut(hook.program()).context("the object lacks a program")?;
    if hook == Hook::UplinkXdp {
        let xdp: &mut Xdp = program.try_into()?;
        xdp.load()?;
        xdp.attach(device, XdpMode::Driver)?;
        return Ok(());
    }
    let classifier: &mut SchedClassifier = program.try_into()?;
    classifier.load()?;
    let _ = tc::qdisc_add_clsact(device);
    let direction = if matches!(hook, Hook::OverlayEgress | Hook::TunnelEgress) {
        TcAttachType::Egress
    } else {
        TcAttachType::Ingress
    };
    classifier.attach(device, direction)?;
    Ok(())
}

/// Runs `work` on a thread inside a namespace.
fn within<T: Send>(ns: &str, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let file = fs::File::open(format!("/run/netns/{ns}"))?;
    thread::scope(|scope| {
        let thread = scope.spawn(move || {
            setns(file, CloneFlags::CLONE_NEWNET).context("enter the namespace")?;
            work()
        });
        thread.join().unwrap_or_else(|_| bail!("the thread in {ns} panicked"))
    })
}

fn napi_threads(device: &str) -> Result<Vec<i32>> {
    threads_named(&format!("napi/{device}-"))
}

/// Returns the threads whose name starts with `prefix`.
fn threads_named(prefix: &str) -> Result<Vec<i32>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse().ok()) else { continue };
        if fs::read_to_string(entry.path().join("comm")).is_ok_and(|c| c.starts_with(prefix)) {
            found.push(pid);
        }
    }
    Ok(found)
}

fn pin(pid: i32, core: usize) -> Result<()> {
    let mut cpu = CpuSet::new();
    cpu.set(core)?;
    sched_setaffinity(Pid::from_raw(pid), &cpu).with_context(|| format!("pin {pid} to CPU {core}"))
}

fn cpu_time(pid: i32) -> Result<Duration> {
    let text = fs::read_to_string(format!("/proc/{pid}/schedstat"))?;
    let nanoseconds = text.split(' ').next().context("schedstat is empty")?.parse()?;
    Ok(Duration::from_nanos(nanoseconds))
}

/// Returns an IPv4/UDP packet of 46 bytes, the smallest that Ethernet carries without padding. [`REMOTE`]
/// stands for its `.1`.
fn inner_packet(from: [u8; 4], to: [u8; 4]) -> Vec<u8> {
    let first = |a: [u8; 4]| if a == REMOTE { (u32::from_be_bytes(a) + 1).to_be_bytes() } else { a };
    let mut packet = ipv4(first(from), first(to), 17, 26);
    packet.extend([0x9c, 0x40, 0x00, 0x35, 0, 26, 0, 0]);
    packet.extend([0; 18]);
    packet
}

fn ipv4(from: [u8; 4], to: [u8; 4], protocol: u8, payload: usize) -> Vec<u8> {
    let mut header = [0u8; 20];
    header[0] = 0x45;
    header[2..4].copy_from_slice(&((20 + payload) as u16).to_be_bytes());
    (header[8], header[9]) = (64, protocol);
    header[12..16].copy_from_slice(&from);
    header[16..20].copy_from_slice(&to);
    let sum = raven_common::checksum::ipv4(&header);
    header[10..12].copy_from_slice(&sum.to_be_bytes());
    header.to_vec()
}

fn ethernet(to: [u8; 6], from: [u8; 6], payload: &[u8]) -> Vec<u8> {
    [&to[..], &from, &[0x08, 0x00], payload].concat()
}

fn framed(packet: Vec<u8>) -> [u8; FRAME_LEN] {
    let mut frame = [0; FRAME_LEN];
    frame[..packet.len()].copy_from_slice(&packet);
    frame
}

/// Returns the frame that the pool's other node sends to the gateway node.
fn overlay_frame(inner: &[u8]) -> [u8; FRAME_LEN] {
    // The outer header counts the padding of the frame as payload.
    let payload = FRAME_LEN - 14 - 20;
    let mut outer = ipv4(MEMBER, GATEWAY, 17, payload);
    outer.extend([0xc0, 0x01]);
    outer.extend(4472u16.to_be_bytes());
    outer.extend((payload as u16).to_be_bytes());
    outer.extend([0, 0, 0x08, 0, 0, 0, 0, 0, 200, 0]);
    outer.extend(ethernet([0x02, b'r', b'a', b'v', b'e', b'n'], [0x02, b'r', b'a', b'v', b'e', b's'], inner));
    framed(ethernet(UPLINK_MAC, LAN_MAC, &outer))
}

/// Returns the frame for the L3 device: VXLAN-GPE (draft-ietf-nvo3-vxlan-gpe) with next protocol 1, IPv4.
fn gpe_frame(inner: &[u8]) -> [u8; FRAME_LEN] {
    let payload = FRAME_LEN - 14 - 20;
    let mut outer = ipv4([10, 9, 1, 2], [10, 9, 1, 1], 17, payload);
    outer.extend([0xc0, 0x01]);
    outer.extend(FEED_PORT.to_be_bytes());
    outer.extend((payload as u16).to_be_bytes());
    outer.extend([0, 0, 0x0c, 0, 0, 1, 0, 0, 1, 0]);
    outer.extend(inner);
    framed(ethernet(FEED_MAC, LAN_MAC, &outer))
}
