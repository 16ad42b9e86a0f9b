//! Tests of the userspace WireGuard engine on bare devices between two nodes of a lab: the protocol with another
//! implementation, changes under traffic, hostile input, and what it costs. The virtual machines test it with the kernel's
//! implementation (`tests/vm`); its offloads have tests of their own (`raven-engine/src/offload/`).

#![forbid(unsafe_code)]

use std::{
    net::{IpAddr, SocketAddr, UdpSocket},
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use nix::sys::{
    signal::Signal,
    socket::{setsockopt, sockopt::RcvBufForce},
};
use raven_engine::Options;
use raven_tests::{
    Lab, Namespace, PoolSpec,
    bare::{Bare, Engine},
    eventually,
    flood::{self, Flood},
    forge,
    kubernetes::binaries::WIREGUARD,
    patience,
    probe::{self, Flow},
    process::memory_mb,
    require_root,
};

/// Bytes of a transfer in each direction.
const BULK: u64 = 20_000_000;
const SOON: Duration = Duration::from_secs(20);

/// Two nodes on one LAN.
async fn lab() -> Lab {
    let mut pools = PoolSpec::three();
    pools.truncate(1);
    Lab::builder().pools(pools).without_kubernetes().up().await.expect("build the lab")
}

/// A tunnel of Raven's engine between the two nodes.
async fn tunnel(lab: &Lab) -> Bare {
    let (a, b) = (lab.node("cloud-a"), lab.node("cloud-b"));
    let started = Bare::start(lab, 1, [(a, Engine::Raven), (b, Engine::Raven)], |port| (a.lan_v4, port).into());
    started.await.expect("start the tunnel")
}

/// wireguard-go.
async fn go() -> Result<Engine> {
    Ok(Engine::Go(WIREGUARD.find_or_build().await?.program("wireguard")))
}

/// Transfers bytes in both directions and over both families; the receiver verifies their hash.
async fn transfer(lab: &Lab, tunnel: &Bare) -> Result<()> {
    let (a, b) = (&lab.node("cloud-a").ns, &lab.node("cloud-b").ns);
    for (to_a, to_b) in tunnel.addresses(0).into_iter().zip(tunnel.addresses(1)) {
        probe::bulk(b, a, to_a, BULK, SOON).await.context("to the first end")?;
        probe::bulk(a, b, to_b, BULK, SOON).await.context("to the second end")?;
    }
    Ok(())
}

/// A line of `wg show DEVICE all dump` for the only peer: its fields.
fn peer(lab: &Lab, node: &str, device: &str) -> Result<Vec<String>> {
    let dump = lab.node(node).ns.run("wg", &["show", device, "dump"])?;
    let line = dump.lines().nth(1).with_context(|| format!("{device} of {node} has no peer"))?;
    Ok(line.split('\t').map(str::to_owned).collect())
}

#[tokio::test(flavor = "multi_thread")]
async fn both_roles_work_with_wireguard_go() {
    require_root!();
    let go = match go().await {
        Ok(go) => go,
        Err(e) => return println!("SKIPPED both_roles_work_with_wireguard_go: {e:#}"),
    };
    let lab = lab().await;
    let (a, b) = (lab.node("cloud-a"), lab.node("cloud-b"));
    let v4 = Bare::start(&lab, 1, [(a, Engine::Raven), (b, go.clone())], |port| (a.lan_v4, port).into());
    let responder = v4.await.expect("wireguard-go dials Raven's engine");
    let v6 = Bare::start(&lab, 2, [(a, go), (b, Engine::Raven)], |port| (a.lan_v6, port).into());
    let initiator = v6.await.expect("Raven's engine dials wireguard-go at an IPv6 address");
    transfer(&lab, &responder).await.expect("transfer with Raven's engine as the responder");
    transfer(&lab, &initiator).await.expect("transfer with Raven's engine as the initiator");

    // Roaming: each end changes its port, and the other one follows the next packet.
    for (tunnel, mover, other) in [(&responder, "cloud-a", "cloud-b"), (&initiator, "cloud-b", "cloud-a")] {
        let device = &tunnel.device;
        lab.node(mover).ns.run("wg", &["set", device, "listen-port", "4999"]).expect("change the port");
        let far = tunnel.v4[usize::from(mover == "cloud-a")];
        let answers = || async { probe::ping(&lab.node(mover).ns, far.into()).await?.context("no answer") };
        eventually(SOON, "the moved end is heard", answers).await.expect("an answer");
        let fields = peer(&lab, other, device).expect("the peer of the other end");
        assert!(fields[2].ends_with(":4999"), "the endpoint that {other} has learned: {}", fields[2]);
        lab.node(mover).ns.run("wg", &["set", device, "listen-port", "0"]).expect("free the port");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_of_peers_under_traffic_lose_nothing() {
    require_root!();
    let lab = lab().await;
    let tunnel = tunnel(&lab).await;
    let (a, b) = (lab.node("cloud-a"), lab.node("cloud-b"));
    let handshake = peer(&lab, "cloud-b", "bare1").expect("the peer")[4].clone();
    let flows = [
        Flow::start(&b.ns, &a.ns, tunnel.v4[0].into(), 1000).expect("start a flow"),
        Flow::start(&a.ns, &b.ns, tunnel.v6[1].into(), 1000).expect("start a flow"),
    ];
    let (mut changes, begin) = (0_u32, Instant::now());
    let other = "+Dn7kd3xX0bVkeQH9cAxjRKfTbiIUKwsp22gnVoPTWk=";
    // 24 changes a second for a minute, of every kind, on both ends.
    while begin.elapsed() < Duration::from_secs(60) {
        for (node, end) in [(a, 0), (b, 1)] {
            let (key, device) = (&tunnel.keys[1 - end], &tunnel.device);
            let own = format!("{}/32,{}/128", tunnel.v4[1 - end], tunnel.v6[1 - end]);
            let script = match changes / 2 % 6 {
                // A prefix is added, and then removed by stating the others.
                0 => format!("wg set {device} peer {key} allowed-ips {own},10.99.0.0/16"),
                1 => format!("wg set {device} peer {key} allowed-ips {own}"),
                2 => format!("wg set {device} peer {key} persistent-keepalive {}", 10 + changes % 20),
                // A new peer takes a prefix that contains the other's addresses; then it goes.
                3 => format!("wg set {device} peer {other} allowed-ips 172.16.0.0/12,10.99.0.0/16"),
                4 => format!("wg set {device} peer {other} remove"),
                // The same key, port and preshared key again.
                _ => format!("wg set {device} private-key /run/raven/{device}.key listen-port {}", tunnel.port),
            };
            node.ns.sh(&script).expect("change the device");
            changes += 1;
        }
        let due = begin + Duration::from_secs(1) * changes / 24;
        tokio::time::sleep(due.saturating_duration_since(Instant::now())).await;
    }
    for flow in flows {
        let report = flow.stop().await.expect("stop the flow");
        assert_eq!((report.lost, report.reordered, report.duplicated), (0, 0, 0), "{report:?}");
        assert!(report.received as f64 > 50_000.0 / patience(), "{report:?}");
    }
    assert!(f64::from(changes) > 1300.0 / patience(), "{changes} changes");
    assert_eq!(peer(&lab, "cloud-b", "bare1").expect("the peer")[4], handshake, "a change renewed the session");
}

#[tokio::test(flavor = "multi_thread")]
async fn mark_of_outgoing_packets_is_set_and_removed() {
    require_root!();
    let lab = lab().await;
    let tunnel = tunnel(&lab).await;
    let b = lab.node("cloud-b");
    b.ns.nft(
        "table inet marks {
            counter marked {}
            counter plain {}
            chain out {
                type filter hook output priority 0
                udp dport 4501 meta mark 0x77 counter name marked
                udp dport 4501 meta mark != 0x77 counter name plain
            }
        }",
    )
    .expect("count packets by their mark");
    let counted = |name: &str| -> u64 {
        let shown = b.ns.sh(&format!("nft list counter inet marks {name}")).expect("read the counter");
        let mut words = shown.split_whitespace().skip_while(|word| *word != "packets").skip(1);
        words.next().and_then(|word| word.parse().ok()).expect("a number")
    };
    for (mark, other) in [("0x77", "plain"), ("0", "marked")] {
        b.ns.run("wg", &["set", "bare1", "fwmark", mark]).expect("set the mark");
        let before = counted(other);
        let answered = probe::ping(&b.ns, tunnel.v4[0].into()).await.expect("ping");
        assert!(answered.is_some(), "no answer with mark {mark}");
        assert_eq!(counted(other), before, "packets counted as {other} with mark {mark}");
    }
    assert!(counted("marked") > 0);
    assert!(counted("plain") > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_come_from_the_address_that_was_dialled() {
    require_root!();
    let lab = lab().await;
    let (a, b) = (lab.node("cloud-a"), lab.node("cloud-b"));
    let second: [(IpAddr, u8); 2] =
        [("10.0.0.77".parse().expect("an address"), 24), ("fd10::77".parse().expect("an address"), 64)];
    for (number, (address, length)) in (1..).zip(second) {
        // The second address of a node with two uplinks. As a NAT on the way, b drops answers from the first one.
        // An IPv6 address that is preferred would be chosen in any case.
        let options = if address.is_ipv6() { "nodad preferred_lft 0" } else { "" };
        a.ns.ip(&format!("addr add {address}/{length} dev eth0 {options}")).expect("add the address");
        let match_first = match address {
            IpAddr::V4(_) => format!("ip saddr {}", a.lan_v4),
            IpAddr::V6(_) => format!("ip6 saddr {}", a.lan_v6),
        };
        let drop_first = format!("udp dport {} {match_first} drop", 4500 + u16::from(number));
        b.ns.nft(&format!("table inet nat {{ chain in {{ type filter hook input priority 0; {drop_first}; }}; }}"))
            .expect("drop answers");
        let ends = [(a, Engine::Raven), (b, Engine::Raven)];
        let tunnel = Bare::start(&lab, number, ends, |port| (address, port).into()).await.expect("a session");
        transfer(&lab, &tunnel).await.expect("transfer");
        // Datagrams that exceed the path's MTU are not sent as runs.
        let peer = if address.is_ipv6() { IpAddr::from(b.lan_v6) } else { b.lan_v4.into() };
        a.ns.ip(&format!("route add {peer} dev eth0 mtu 1400")).expect("lower the MTU of the path");
        transfer(&lab, &tunnel).await.expect("transfer on a path with a small MTU");
        // The dialled address is gone, so the routes choose another one.
        b.ns.sh("nft delete table inet nat").expect("accept all");
        a.ns.ip(&format!("addr del {address}/{length} dev eth0")).expect("delete the address");
        let answers = || async { probe::ping(&a.ns, tunnel.v4[1].into()).await?.context("no answer") };
        eventually(SOON, "the peer is reached from the other address", answers).await.expect("an answer");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn several_devices_run_in_one_process() {
    require_root!();
    let lab = lab().await;
    // In the node's network, with the configuration sockets of this process.
    let inside = Namespace { mount: None, ..lab.node("cloud-a").ns.clone() };
    let names = [1, 2].map(|number| format!("rt{}-{number}", std::process::id()));
    let started = names.clone();
    let engines = inside.within(move || {
        let options = Options { workers: 1, persistent: false };
        started.map(|name| raven_engine::Engine::start(&name, options).expect("start an engine"))
    });
    let engines = engines.expect("enter the namespace");
    let folder = tempfile::tempdir().expect("a folder");
    let key = |number: usize| folder.path().join(number.to_string()).display().to_string();
    let public =
        [0, 1].map(|at| inside.sh(&format!("umask 077; wg genkey > {0}; wg pubkey < {0}", key(at))).expect("a key"));
    for at in [0, 1] {
        let (name, other) = (&names[at], 1 - at);
        inside
            .sh(&format!(
                "wg set {name} private-key {} listen-port {} peer {} allowed-ips 10.98.{other}.0/24 \
                 endpoint 127.0.0.1:{} persistent-keepalive 1",
                key(at),
                4600 + at,
                public[other].trim(),
                4600 + other,
            ))
            .expect("configure the device");
    }
    let connected = || async {
        for name in &names {
            let shown = inside.run("wg", &["show", name, "latest-handshakes"])?;
            ensure!(shown.split_whitespace().nth(1).is_some_and(|time| time != "0"), "{name} has no session");
        }
        Ok(())
    };
    eventually(SOON, "the two devices have a session", connected).await.expect("a session");
    engines.iter().for_each(|engine| engine.stopper().stop());
    for engine in engines {
        engine.wait().expect("the engine ends");
    }
    assert!(names.iter().all(|name| !raven_engine::socket(name).exists()), "a socket is left");
    let devices = inside.run("ip", &["-br", "link"]).expect("list the devices");
    assert!(names.iter().all(|name| !devices.contains(name)), "a device is left: {devices}");
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_sends_what_was_accepted() {
    require_root!();
    let lab = lab().await;
    let mut tunnel = tunnel(&lab).await;
    let (a, b) = (lab.node("cloud-a"), lab.node("cloud-b"));
    let to: SocketAddr = (tunnel.v4[0], 7777).into();
    let receiver = a.ns.within(move || UdpSocket::bind(to)).expect("enter").expect("bind");
    // 200 packets are more than the default buffer holds.
    setsockopt(&receiver, RcvBufForce, &(4 << 20)).expect("enlarge the buffer");
    receiver.set_read_timeout(Some(Duration::from_secs(2))).expect("set a timeout");
    let engine = tunnel.engines[1].as_mut().expect("an engine");
    // Stopped, so that the packets and the signal wait together.
    engine.signal(Signal::SIGSTOP).expect("stop the engine");
    let sent = 200;
    let sender = b.ns.within(|| UdpSocket::bind("0.0.0.0:0")).expect("enter").expect("bind");
    for number in 0..sent {
        sender.send_to(&[number as u8; 1000], to).expect("send");
    }
    engine.signal(Signal::SIGTERM).expect("signal the engine");
    engine.signal(Signal::SIGCONT).expect("continue the engine");
    let mut buffer = [0; 2000];
    let received = (0..sent).take_while(|number| {
        receiver.recv(&mut buffer).is_ok_and(|length| length == 1000 && buffer[0] == *number as u8)
    });
    assert_eq!(received.count(), sent, "packets after SIGTERM");
    let status = engine.wait().expect("wait for the engine");
    assert!(status.success(), "{status}");
    assert!(b.ns.sh("ip link show bare1").is_err(), "the device still exists");
    let left = b.ns.sh("ls /var/run/wireguard").expect("list the sockets");
    assert_eq!(left.trim(), "", "sockets that are left");
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_forged_handshakes_a_second_stop_no_session() {
    require_root!();
    let lab = lab().await;
    let (a, b) = (lab.node("cloud-a"), lab.node("cloud-b"));
    let mut pairs = vec![[Engine::Raven, Engine::Raven]];
    match go().await {
        // Both have to understand the other's cookies.
        Ok(go) => pairs.extend([[Engine::Raven, go.clone()], [go, Engine::Raven]]),
        Err(e) => println!("SKIPPED the flood with wireguard-go: {e:#}"),
    }
    for (number, [attacked, honest]) in (1..).zip(pairs) {
        let ends = [(a, attacked.clone()), (b, honest)];
        let tunnel = Bare::start(&lab, number, ends, |port| (a.lan_v4, port).into()).await.expect("start the tunnel");
        flooded(&lab, &tunnel, attacked == Engine::Raven).await;
    }
}

/// Floods the first end with handshakes, while a session exists, and while the second end starts a new one.
async fn flooded(lab: &Lab, tunnel: &Bare, attacks_raven: bool) {
    let (a, b) = (lab.node("cloud-a"), lab.node("cloud-b"));
    let target: SocketAddr = (a.lan_v4, tunnel.port).into();
    let flood = Flood::start(tunnel, b, a, target, 10_000, 100).expect("start the flood");
    let flow = Flow::start(&b.ns, &a.ns, tunnel.v4[0].into(), 1000).expect("start a flow");
    tokio::time::sleep(Duration::from_secs(2)).await;
    let report = flow.stop().await.expect("stop the flow");
    // wireguard-go's own losses, and the load at which it demands cookies, are not the subject.
    let new = flood::new_session(tunnel, b, target, attacks_raven).await;
    let rate = flood.stop().await.expect("send the flood");
    println!("{}: {rate:.0} forged handshakes/s; the session: {report:?}", tunnel.device);
    new.expect("a new session");
    if attacks_raven {
        assert_eq!(report.lost, 0, "the established session: {report:?}");
        assert!(rate > 8000.0 / patience(), "{rate:.0} messages/s");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn thousand_peers_and_full_load_stay_within_memory() {
    require_root!();
    let lab = lab().await;
    let tunnel = tunnel(&lab).await;
    let a = lab.node("cloud-a");
    let engine = tunnel.engines[0].as_ref().expect("an engine").pid();
    let peers: String = (0..1000_u32)
        .map(|n| {
            let key = forge::any_key(n);
            format!(
                "[Peer]\nPublicKey = {key}\nAllowedIPs = 10.{}.{}.0/24\nEndpoint = 192.0.2.1:4500\n",
                100 + n / 250,
                n % 250
            )
        })
        .collect();
    let file = Path::new("/run/raven/peers.conf");
    std::fs::write(a.dir.join("run/peers.conf"), peers).expect("write the peers");
    a.ns.sh(&format!("wg addconf bare1 {}", file.display())).expect("add the peers");
    let shown = a.ns.sh("wg show bare1 allowed-ips | wc -l").expect("list the peers");
    assert_eq!(shown.trim(), "1001");
    // Without the pages of the program's file, which all of Raven's processes on a node share.
    let idle = memory_mb(engine, "RssAnon").expect("read the memory");
    transfer(&lab, &tunnel).await.expect("transfer");
    let peak = memory_mb(engine, "VmHWM").expect("read the memory");
    println!("{idle:.1} MB idle with 1,000 peers, at most {peak:.1} MB under load");
    assert!(idle < 30.0, "{idle} MB");
    assert!(peak < 100.0, "{peak} MB");
}
