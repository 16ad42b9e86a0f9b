//! Checks shared by the demo and the tests. Each function verifies one property with real packets. It returns a summary
//! of the observation, or an error that describes the deviation.

mod lossless;

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use etherparse::PacketBuilder;
use kube::Api;
use raven_api::GatewayNode;
use raven_common::Verdict;
use serde_json::Value;

use crate::{
    Lab, Pod,
    agent::Agent,
    capture::{Capture, Recording},
    eventually,
    namespace::Namespace,
    probe::{self, Echo},
    site::{Node, Pool},
};
pub use lossless::{lossless, restart, restart_under};

/// A checked property and its result.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Check {
    /// Name of the property.
    pub name: String,
    /// Whether the property holds.
    pub ok: bool,
    /// Observation or error.
    pub detail: String,
}

impl Check {
    /// Creates a check from the result of a function of this module.
    pub fn new(name: impl Into<String>, result: Result<String>) -> Self {
        let (ok, detail) = match result {
            Ok(detail) => (true, detail),
            Err(error) => (false, format!("{error:#}")),
        };
        Self { name: name.into(), ok, detail }
    }
}

/// Payload that may cross the internet only inside the tunnel; captures are searched for it.
pub const MARKER: &[u8] = b"raven-marker-that-must-never-cross-in-clear";

const ANSWER: Duration = Duration::from_secs(5);
/// Time limit for a fresh lab until all pairs of pods reach each other.
pub const CONVERGENCE: Duration = Duration::from_secs(60);

/// Names of the address families; indices as in [`Pod::addresses`].
pub const FAMILIES: [&str; 2] = ["IPv4", "IPv6"];

/// Number of packets per verdict on a node, summed over all Gateways.
pub type Counters = BTreeMap<Verdict, u64>;

/// Reads the pinned counters of a node with `bpftool map dump`, as an operator would.
pub fn counters(node: &Node) -> Result<Counters> {
    let dump = node.ns.run("bpftool", &["-j", "map", "dump", "pinned", "/sys/fs/bpf/raven/v1/maps/COUNTERS"])?;
    let entries: Vec<Value> =
        serde_json::from_str(&dump).with_context(|| format!("parse bpftool's output on {}", node.name))?;
    let mut counters = Counters::new();
    for entry in &entries {
        let entry = &entry["formatted"];
        let number = entry["key"]["verdict"].as_u64().context("the key has no field `verdict`")?;
        let verdict =
            Verdict::from_number(u32::try_from(number)?).with_context(|| format!("verdict {number} is unknown"))?;
        let values = entry["values"].as_array().context("the entry has no per-CPU values")?;
        let packets: u64 = values.iter().filter_map(|v| v["value"]["packets"].as_u64()).sum();
        *counters.entry(verdict).or_default() += packets;
    }
    Ok(counters)
}

/// Returns the increase of a verdict's counter.
pub fn increase(before: &Counters, after: &Counters, verdict: Verdict) -> u64 {
    after.get(&verdict).unwrap_or(&0) - before.get(&verdict).unwrap_or(&0)
}

/// Returns the gateway node and a member of a pool of the default lab.
fn gateway_and_member<'a>(lab: &'a Lab, pool: &Pool) -> (&'a Node, &'a Node) {
    let nodes: Vec<&Node> = lab.nodes.iter().filter(|n| n.pool == pool.spec.name).collect();
    (nodes[0], nodes[1])
}

/// Returns all unordered pairs of pools.
pub fn pairs(lab: &Lab) -> Vec<(Pool, Pool)> {
    let pools = &lab.pools;
    (0..pools.len()).flat_map(|a| (a + 1..pools.len()).map(move |b| (pools[a].clone(), pools[b].clone()))).collect()
}

/// Without Raven, no pod reaches another pool. This is the precondition of all other checks.
pub async fn isolated(lab: &Lab) -> Result<String> {
    let mut tried = 0;
    for (a, b) in pairs(lab) {
        let (from, to) = (gateway_and_member(lab, &a).1, gateway_and_member(lab, &b).1);
        for address in lab.pod(&to.name).addresses() {
            let answer = probe::ping(&lab.pod(&from.name).ns, address).await?;
            ensure!(answer.is_none(), "{} reaches {address} of {} without Raven", from.name, to.name);
            tried += 1;
        }
    }
    Ok(format!("{tried} of {tried} pings between pools stay unanswered"))
}

/// Waits until pods of every pair of pools reach each other.
pub async fn converged(lab: &Lab) -> Result<String> {
    let start = Instant::now();
    for (a, b) in pairs(lab) {
        let (from, to) = (gateway_and_member(lab, &a).1, gateway_and_member(lab, &b).1);
        for address in lab.pod(&to.name).addresses() {
            let what = format!("{} reaches {address} of {}", from.name, to.name);
            eventually(CONVERGENCE, &what, || async {
                probe::ping(&lab.pod(&from.name).ns, address).await?.context("no answer")
            })
            .await?;
        }
    }
    Ok(format!(
        "every pair of pools is connected {:.1} s after the start of the last agent",
        start.elapsed().as_secs_f64()
    ))
}

/// Pods of two pools reach each other by ICMP, TCP and UDP in both directions, from members and gateway nodes,
/// with unchanged source addresses.
pub async fn reach(lab: &Lab, a: &Pool, b: &Pool, family: usize) -> Result<String> {
    let mut ttls = Vec::new();
    let ((gateway_a, node_a), (gateway_b, node_b)) = (gateway_and_member(lab, a), gateway_and_member(lab, b));
    for (from, to) in
        [(node_a, node_b), (node_b, node_a), (gateway_a, node_b), (node_b, gateway_a), (gateway_a, gateway_b)]
    {
        let ttl = exchange(lab.pod(&from.name), lab.pod(&to.name), family)
            .await
            .with_context(|| format!("{} → {}", from.name, to.name))?;
        ttls.push(ttl);
    }
    // Every router on the path decrements the TTL: both nodes' stacks and each gateway node's redirect.
    let hops = 64 - ttls[0];
    let relayed = a.spec.number != 0 && b.spec.number != 0;
    let expected = if relayed { 5 } else { 4 };
    ensure!(hops == expected, "{} → {} has {hops} hops, not {expected}", node_a.name, node_b.name);
    let path = if relayed {
        format!("{} → cloud → {}", a.spec.name, b.spec.name)
    } else {
        format!("{} → {}", a.spec.name, b.spec.name)
    };
    Ok(format!("ICMP, TCP, UDP in both directions, sources unchanged; {hops} hops by {path}"))
}

async fn exchange(from: &Pod, to: &Pod, family: usize) -> Result<u8> {
    let (source, target) = (from.addresses()[family], to.addresses()[family]);
    let ttl = probe::ping(&from.ns, target).await?.with_context(|| format!("{target} does not answer a ping"))?;
    let echo = Echo::start(&to.ns, target)?;
    let payload: Vec<u8> = MARKER.iter().copied().cycle().take(10_000).collect();
    let tcp = probe::tcp_echo(&from.ns, echo.address, &payload, ANSWER).await.context("TCP")?;
    let udp = probe::udp_echo(&from.ns, echo.address, MARKER, ANSWER).await.context("UDP")?;
    for seen in [tcp.ip(), udp.ip()] {
        ensure!(seen == source, "the source {source} arrives as {seen}");
    }
    Ok(ttl)
}

/// A large transfer between members arrives unchanged.
pub async fn bulk(lab: &Lab, from: &str, to: &str, family: usize, bytes: u64) -> Result<String> {
    let (from_pod, to_pod) = (lab.pod(from), lab.pod(to));
    let within = Duration::from_secs(180);
    let bulk = probe::bulk(&from_pod.ns, &to_pod.ns, to_pod.addresses()[family], bytes, within).await?;
    ensure!(bulk.source.ip() == from_pod.addresses()[family], "the transfer arrives from {}", bulk.source);
    Ok(format!("{} MB bit for bit in {:.1} s", bytes / 1_000_000, bulk.elapsed.as_secs_f64()))
}

/// Starts to count the packets of members' pods that netfilter of the gateway nodes sees.
pub fn watch_netfilter(lab: &Lab) -> Result<()> {
    for pool in &lab.pools {
        let (gateway, member) = gateway_and_member(lab, pool);
        let (v4, v6) = (member.pod_cidr_v4(), member.pod_cidr_v6());
        // Replaces the table of an earlier call.
        let mut rules =
            "table inet watch { }\ndelete table inet watch\ntable inet watch { counter pods { }\n".to_owned();
        for hook in ["prerouting", "input", "forward", "output", "postrouting"] {
            rules += &format!(
                "chain {hook} {{ type filter hook {hook} priority -400; ip saddr {v4} counter name pods; ip daddr {v4} counter name pods; \
                 ip6 saddr {v6} counter name pods; ip6 daddr {v6} counter name pods; }}\n"
            );
        }
        gateway.ns.nft(&(rules + "}\n"))?;
        // Deletes flows from before the programs were attached. Deleting a missing flow is an error, which is ignored.
        for address in member.pods.iter().flat_map(Pod::addresses) {
            gateway.ns.sh(&format!("for end in -s -d; do conntrack -D $end {address} 2>/dev/null || true; done"))?;
        }
    }
    Ok(())
}

/// The redirect programs of all gateway nodes forwarded the members' packets, and their netfilter and conntrack saw
/// none of them. `before` is [`all_counters`] before the traffic, after [`watch_netfilter`].
pub fn redirected(lab: &Lab, before: &BTreeMap<String, Counters>, at_least: u64) -> Result<String> {
    redirected_by(lab, before, at_least, Verdict::ToTunnelFast)
}

/// Like [`redirected`], for a given tier: `into` is [`Verdict::ToTunnelFast`], or [`Verdict::ToTunnel`]
/// for the fallback tier.
pub fn redirected_by(lab: &Lab, before: &BTreeMap<String, Counters>, at_least: u64, into: Verdict) -> Result<String> {
    let by = if into == Verdict::ToTunnelFast { "uplink_xdp → uplink_ingress" } else { "overlay_ingress" };
    let mut summaries = Vec::new();
    for pool in &lab.pools {
        let (gateway, member) = gateway_and_member(lab, pool);
        let (before, after) = (&before[&gateway.name], counters(gateway)?);
        let fast = increase(before, &after, into);
        let back = increase(before, &after, Verdict::ToOverlay);
        ensure!(fast >= at_least, "{}: {by} forwarded only {fast} packets ({after:?})", gateway.name);
        ensure!(back >= at_least, "{}: tunnel_ingress forwarded only {back} packets ({after:?})", gateway.name);
        for slow in Verdict::ALL.iter().filter(|v| v.is_stack()) {
            let packets = increase(before, &after, *slow);
            ensure!(packets == 0, "{}: {packets} packets took the slow path: {}", gateway.name, slow.as_str());
        }
        unseen(gateway, member)?;
        let relayed = increase(before, &after, Verdict::Relayed);
        let relay = if relayed > 0 { format!(", {relayed} relayed") } else { String::new() };
        summaries
            .push(format!("{}: {fast} into the tunnel ({by}), {back} out of it (tunnel_ingress){relay}", gateway.name));
    }
    Ok(summaries.join("; "))
}

/// Netfilter and conntrack of a gateway node have processed no packet of a member's pods.
fn unseen(gateway: &Node, member: &Node) -> Result<()> {
    let listed = gateway.ns.run("nft", &["-j", "list", "counter", "inet", "watch", "pods"])?;
    let listed: Value = serde_json::from_str(&listed)?;
    let counter = listed["nftables"]
        .as_array()
        .and_then(|a| a.iter().find_map(|o| o.get("counter")))
        .context("nft lists no counter")?;
    let packets = counter["packets"].as_u64().context("the counter has no number of packets")?;
    ensure!(packets == 0, "{}: netfilter saw {packets} packets of the pods of {}", gateway.name, member.name);
    let flows = gateway.ns.run("conntrack", &["-L"])? + &gateway.ns.run("conntrack", &["-L", "-f", "ipv6"])?;
    let pod = &member.pods[0];
    for address in [pod.v4.to_string(), pod.v6.to_string()] {
        if let Some(line) = flows.lines().find(|l| l.contains(&format!("={address} "))) {
            bail!("{}: conntrack has a flow of {}: {line}", gateway.name, member.name);
        }
    }
    Ok(())
}

/// Returns the counters of all nodes by node name.
pub fn all_counters(lab: &Lab) -> Result<BTreeMap<String, Counters>> {
    lab.nodes.iter().map(|n| Ok((n.name.clone(), counters(n)?))).collect()
}

/// No drop counter of any node has increased. `before` as in [`redirected`].
pub fn no_drops(lab: &Lab, before: &BTreeMap<String, Counters>) -> Result<String> {
    for node in &lab.nodes {
        let after = counters(node)?;
        for drop in Verdict::ALL.iter().filter(|v| v.is_drop()) {
            let packets = increase(&before[&node.name], &after, *drop);
            ensure!(packets == 0, "{}: {packets} packets dropped: {}", node.name, drop.as_str());
        }
    }
    Ok(format!("no drop counter of {} nodes increased", lab.nodes.len()))
}

/// Starts to record the internet.
pub async fn record(lab: &Lab) -> Result<Capture> {
    Capture::internet(lab.site()).await
}

/// No payload and no address of a pod crossed the internet unencrypted; WireGuard packets did cross it.
pub fn encrypted(lab: &Lab, internet: &Recording) -> Result<String> {
    internet.ensure_nothing_in_clear(lab.site(), MARKER)?;
    let wireguard = internet.count("udp port 4500")?;
    ensure!(wireguard > 0, "no WireGuard packet crossed");
    Ok(format!("{wireguard} WireGuard packets crossed, no address and no byte of a pod unencrypted"))
}

/// Pods of every pair of pools communicate, in both families, while the LAN devices of `nodes` are recorded: no payload and
/// no address of a pod is in clear there.
pub async fn encrypted_inside(lab: &Lab, nodes: &[&str]) -> Result<String> {
    let mut captures = Vec::new();
    for node in nodes {
        captures.push(Capture::start(lab.site(), &lab.node(node).ns, "eth0", "").await?);
    }
    for (a, b) in pairs(lab) {
        for family in 0..FAMILIES.len() {
            reach(lab, &a, &b, family).await?;
        }
    }
    let mut wireguard = Vec::new();
    for capture in captures {
        let lan = capture.stop().await?;
        lan.ensure_nothing_in_clear(lab.site(), MARKER)?;
        let overlay = lan.lines("udp port 4472")?;
        ensure!(overlay.is_empty(), "{} overlay packets, the first: {}", overlay.len(), overlay[0]);
        wireguard.push(lan.count("udp port 4500")?);
    }
    ensure!(!wireguard.contains(&0), "a device without WireGuard packets: {wireguard:?}");
    let sum: usize = wireguard.iter().sum();
    Ok(format!("{sum} WireGuard packets on the LAN devices of {}", nodes.join(", ")))
}

/// Each gateway node reports live sessions with all its peers.
pub async fn handshakes(lab: &Lab) -> Result<String> {
    let api: Api<GatewayNode> = Api::all(lab.cluster().client());
    let expected = BTreeMap::from([("cloud-a", "2/2"), ("x-a", "1/1"), ("y-a", "1/1")]);
    eventually(Duration::from_secs(30), "every gateway node reports live peers", || async {
        let mut summaries = Vec::new();
        for (node, peers) in &expected {
            let status = api.get(node).await?.status.context("the GatewayNode has no status yet")?;
            let seen = status.peer_summary.clone().unwrap_or_default();
            ensure!(seen == *peers, "{node} has {seen} peers, not {peers}");
            let by = status.wireguard_backend.unwrap_or_default();
            summaries.push(format!("{node}: {seen} peers, {by}, {}", status.dataplane_tier.unwrap_or_default()));
        }
        Ok(summaries.join("; "))
    })
    .await
}

/// A traceroute shows the hops in order: sender's node, its gateway node, relay, receiver's
/// gateway node, receiver's node.
pub fn traceroute(lab: &Lab) -> Result<String> {
    let (from, to) = (lab.pod("x-b"), lab.pod("y-b"));
    let hops = ["x-b", "x-a", "cloud-a", "y-a", "y-b"];
    for target in to.addresses() {
        for (hop, node) in hops.iter().enumerate() {
            let output = from.ns.sh(&format!("ping -c1 -W2 -t {} {target} || true", hop + 1))?;
            let router =
                output.lines().find_map(|l| l.strip_prefix("From ")?.split_whitespace().next()?.parse::<IpAddr>().ok());
            let router = router.with_context(|| format!("hop {} of {target} does not answer: {output}", hop + 1))?;
            let addresses = lab.node(node).ns.sh("ip -o addr")?;
            ensure!(
                addresses.contains(&format!(" {router}/")),
                "hop {} is {router}, which is not {node}: {output}",
                hop + 1
            );
        }
    }
    Ok(hops.join(" → "))
}

/// Capture filter for fragments of either family.
pub const FRAGMENTS: &str = "ip[6:2] & 0x3fff != 0 or ip6 proto 44";

/// Large transfers in both directions cause no fragments on the internet or on the sender's LAN.
pub async fn unfragmented(lab: &Lab, bytes: u64) -> Result<String> {
    let wire = Capture::start(lab.site(), &lab.inet, "wire", FRAGMENTS).await?;
    let lan = Capture::start(lab.site(), &lab.node("x-b").ns, "eth0", FRAGMENTS).await?;
    for family in 0..2 {
        bulk(lab, "x-b", "y-b", family, bytes).await?;
        bulk(lab, "y-b", "x-b", family, bytes).await?;
    }
    mtu(lab, "x-b", "y-b").await?;
    for capture in [wire, lan] {
        let seen = capture.stop().await?.lines("")?;
        ensure!(seen.is_empty(), "fragments: {seen:?}");
    }
    Ok(format!("{} MB each way in both families, and oversized packets, without a fragment", bytes / 1_000_000))
}

/// Sends a VXLAN packet (network 200) from a namespace to `node`, with an inner IPv4/UDP packet of the given addresses.
/// The kernel builds the outer headers; the payload is forged.
pub fn forged_overlay(from: &Namespace, node: &Node, source: Ipv4Addr, destination: Ipv4Addr) -> Result<()> {
    let any = if node.ipv6_only { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() };
    forged_overlay_from(from, any, node, source, destination)
}

/// The same with a chosen outer source, an address of the namespace.
pub fn forged_overlay_from(
    from: &Namespace,
    outer: IpAddr,
    node: &Node,
    source: Ipv4Addr,
    destination: Ipv4Addr,
) -> Result<()> {
    let builder = PacketBuilder::ethernet2([2, b'r', b'a', b'v', b'e', b's'], [2, b'r', b'a', b'v', b'e', b'n']);
    let builder = builder.ipv4(source.octets(), destination.octets(), 64).udp(1, 9);
    let mut payload = vec![0x08, 0, 0, 0, 0, 0, 200, 0];
    builder.write(&mut payload, b"forged")?;
    let target = SocketAddr::new(node.addresses()[0], 4472);
    from.within(move || UdpSocket::bind((outer, 0)).and_then(|socket| socket.send_to(&payload, target)))??;
    Ok(())
}

/// Forged packets are dropped, counted under the right reason, and listed by the agent. `fallback`: gateway nodes use
/// the fallback tier, which checks the sending node of a packet from another pool first.
pub async fn forged(lab: &Lab, fallback: bool) -> Result<String> {
    let foreign = if fallback { Verdict::DropNotFromGateway } else { Verdict::DropSpoofedInner };
    let (gateway, member) = (lab.node("x-a"), lab.node("x-b"));
    let router = &lab.pool("edge-x").router;
    let (own, neighbour, remote) = (lab.pod("x-b").v4, lab.pod("x-a").v4, lab.pod("y-b").v4);
    let cases = [
        ("an overlay packet from outside the pool", router, gateway, own, Verdict::DropOuterNotInPool),
        ("the source of another node's pod", &member.ns, gateway, neighbour, Verdict::DropSpoofedInner),
        ("the source of another pool's pod", &member.ns, gateway, remote, foreign),
        ("an overlay packet from outside the pool to a member", router, member, remote, Verdict::DropOuterNotInPool),
    ];
    for (what, from, to, source, verdict) in cases {
        let before = counters(to)?;
        // Repeated, because of drops within 10 ms only the first is sampled.
        eventually(Duration::from_secs(10), what, || async {
            forged_overlay(from, to, source, lab.pod("cloud-a").v4)?;
            let after = counters(to)?;
            ensure!(
                increase(&before, &after, verdict) > 0,
                "{} has not increased: {before:?} {after:?}",
                verdict.as_str()
            );
            let listed = http(&to.ns, "[::1]:10265", "/drops").await?;
            ensure!(listed.contains(verdict.as_str()), "/drops does not list {}: {listed}", verdict.as_str());
            Ok(())
        })
        .await?;
    }
    // A process that uses a forged source address: dropped on its own node.
    let before = counters(member)?;
    lab.pod("x-b")
        .ns
        .sh("ip addr add 10.99.9.9/32 dev eth0; ping -c1 -W1 -I 10.99.9.9 10.244.1.10 || true; ip addr del 10.99.9.9/32 dev eth0")?;
    let after = counters(member)?;
    ensure!(increase(&before, &after, Verdict::DropSourceNotMine) > 0, "a forged source is not counted: {after:?}");
    Ok(format!("{} kinds, each dropped, counted and listed", cases.len() + 1))
}

/// A gateway node that sends another pool's addresses into its tunnel delivers nothing: WireGuard accepts from a peer
/// only the peer's allowed IPs. The kernel's WireGuard counts rejected packets at its device, and the agent in its
/// metrics; the embedded engine does not count them.
pub async fn rejects_foreign_sources(lab: &Lab, kernel: bool) -> Result<String> {
    let (sender, victim, receiver, target) = (lab.node("x-a"), lab.pod("y-b"), lab.node("cloud-a"), lab.pod("cloud-b"));
    let count = |words: &str| format!("chain c {{ type filter hook input priority 0; ip saddr {words} counter; }}\n");
    let own = sender.pods[0].v4;
    target.ns.nft(&format!(
        "table ip foreign {{ {} }}\ntable ip own {{ {} }}",
        count(&victim.v4.to_string()),
        count(&own.to_string())
    ))?;
    let packets = |at: &Namespace, table: &str| -> Result<u64> {
        let listed = at.sh(&format!("nft list table ip {table} | sed -n 's/.*packets \\([0-9]*\\) .*/\\1/p'"))?;
        listed.trim().parse().with_context(|| format!("parse the counter of table {table}: {listed:?}"))
    };
    let rejected = || -> Result<u64> {
        let text = receiver.ns.sh("cat /sys/class/net/raven-wg0/statistics/rx_frame_errors")?;
        text.trim().parse().with_context(|| format!("parse rx_frame_errors {text:?}"))
    };
    let before = rejected()?;
    let send = |source: std::net::Ipv4Addr, options: &str| {
        let script = format!(
            "ip addr add {source}/32 dev lo; ping {options} -c 5 -i 0.2 -W 1 -I {source} {} || true; ip addr del {source}/32 dev lo",
            target.v4
        );
        sender.ns.sh(&script)
    };
    // A control: an address of the sender's own pool takes the same path.
    send(own, "")?;
    ensure!(packets(&target.ns, "own")? > 0, "packets with the sender's own address do not arrive");
    sender.ns.nft(&format!(
        "table ip sent {{ chain c {{ type filter hook postrouting priority 300; oifname raven-wg0 ip saddr {} counter; }}\n}}",
        victim.v4
    ))?;
    // kube-proxy's mark: without it, the agent's nft table replaces a local address outside the node's prefix.
    send(victim.v4, "-m 16384")?;
    let sent = packets(&sender.ns, "sent")?;
    sender.ns.nft("delete table ip sent")?;
    ensure!(sent >= 5, "{sent} packets left {} with a foreign source", sender.name);
    let (foreign, counted) = (packets(&target.ns, "foreign")?, rejected()? - before);
    target.ns.nft("delete table ip foreign\ndelete table ip own")?;
    ensure!(foreign == 0, "{foreign} packets from {} arrived by the tunnel of {}", victim.v4, sender.name);
    if !kernel {
        return Ok("5 sent, none arrived".to_owned());
    }
    ensure!(counted >= 5, "{} counted {counted} rejected packets", receiver.name);
    let metric = metric(&receiver.ns, "raven_tunnel_refused_packets_total")
        .await?
        .context("the agent exports no such metric")?;
    ensure!(metric >= counted, "the metric is {metric}, the device's counter {counted}");
    Ok(format!("5 sent, none arrived; {counted} rejected by WireGuard on {} and counted in its metrics", receiver.name))
}

/// A packet of the path's MTU passes, and one byte more is answered with an error that contains the MTU.
pub async fn mtu(lab: &Lab, from: &str, to: &str) -> Result<String> {
    const MTU: u32 = 1420;
    let (from, to) = (lab.pod(from), lab.pod(to));
    for (target, headers) in [(IpAddr::V4(to.v4), 28), (IpAddr::V6(to.v6), 48)] {
        let fits = (MTU - headers).to_string();
        let answer = probe::ping_with(&from.ns, target, &["-M", "do", "-s", &fits]).await?;
        ensure!(answer.is_some(), "a packet of {MTU} bytes to {target} is not answered");
        let too_big = (MTU - headers + 1).to_string();
        let output = ping_unfragmented(&from.ns, target, &too_big)?;
        ensure!(
            output.contains(&format!("{MTU}")),
            "the answer to a packet of {} bytes to {target} lacks the MTU: {output}",
            MTU + 1
        );
    }
    Ok(format!("{MTU} bytes pass, {} bytes are answered with `mtu {MTU}`", MTU + 1))
}

/// Returns the output of ping for packets that must not be fragmented.
fn ping_unfragmented(from: &Namespace, target: IpAddr, size: &str) -> Result<String> {
    let mut command = from.command("ping");
    command.args(["-c", "2", "-i", "0.2", "-W", "1", "-M", "do", "-s", size, &target.to_string()]);
    let output = command.output().context("run ping")?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr))
}

/// Waits until all peers of a gateway node have the preshared key `key`, as printed by `wg` (`(none)` for no key).
/// Returns the number of peers.
pub async fn preshared(node: &Node, key: &str) -> Result<usize> {
    eventually(Duration::from_secs(60), &format!("all peers of {} have the preshared key", node.name), || async {
        let shown = node.ns.run("wg", &["show", "raven-wg0", "preshared-keys"])?;
        ensure!(shown.lines().count() > 0 && shown.lines().all(|line| line.ends_with(&format!("\t{key}"))), "{shown}");
        Ok(shown.lines().count())
    })
    .await
}

/// Removes all WireGuard peers of a gateway node and triggers the agent's reconcile run, which recreates them. With the
/// kernel's WireGuard, an existing session keeps an old preshared key for up to three minutes.
pub fn end_sessions(node: &Node) -> Result<()> {
    let end = "for key in $(wg show raven-wg0 peers); do wg set raven-wg0 peer $key remove; done";
    node.ns.sh(&format!("{end}; ip rule del pref 100")).map(drop)
}

/// Waits until an agent reports that its dataplane is as planned.
pub async fn ready(agent: &Agent) -> Result<()> {
    let what = format!("the agent of {} is ready", agent.node.name);
    eventually(Duration::from_secs(30), &what, || async {
        let answer = http(&agent.node.ns, "127.0.0.1:10275", "/readyz").await?;
        ensure!(answer.starts_with("HTTP/1.1 200"), "/readyz answers {}", answer.lines().next().unwrap_or_default());
        Ok(())
    })
    .await
}

/// Returns the value of one of the agent's metrics, by name with labels, or `None` if the agent does
/// not export it (yet).
pub async fn metric(ns: &Namespace, name: &str) -> Result<Option<u64>> {
    let text = http(ns, "[::1]:10265", "/metrics").await?;
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    value.map(|value| value.parse().with_context(|| format!("parse {name} {value:?}"))).transpose()
}

/// Sends a GET request from a namespace and returns the whole response.
pub async fn http(ns: &Namespace, address: &str, path: &str) -> Result<String> {
    http_of(ns, address, address, path, ANSWER).await
}

/// Sends a GET request for another host, with a deadline for the connection and for each read.
pub async fn http_of(ns: &Namespace, address: &str, host: &str, path: &str, within: Duration) -> Result<String> {
    let (address, host, path) = (address.to_owned(), host.to_owned(), path.to_owned());
    ns.within_async(move || {
        use std::io::{Read, Write};
        let to = address.parse().with_context(|| format!("parse {address} as address and port"))?;
        let mut stream =
            std::net::TcpStream::connect_timeout(&to, within).with_context(|| format!("connect to {address}"))?;
        stream.set_read_timeout(Some(within))?;
        stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n").as_bytes())?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    })
    .await?
}

/// After `raven-agent cleanup`, nothing that Raven installed is left on a node.
pub fn cleaned(lab: &Lab, agent: &mut Agent) -> Result<String> {
    agent.kill()?;
    let removed = lab.agent_command(&agent.node.name, &["cleanup"])?;
    nothing_left(&agent.node)?;
    Ok(format!("{} objects removed, none left", removed.lines().count()))
}

/// Nothing that Raven installs is on a node.
pub fn nothing_left(node: &Node) -> Result<()> {
    for (what, command) in [
        ("a device", "ip -o link show | grep raven || true"),
        (
            "a route",
            "for family in -4 -6; do ip $family route show table all; done | grep -e 'table 9027' -e 'table 9029' -e 'table 9030' || true",
        ),
        ("a rule", "ip rule | grep -e 9027 -e 9029 -e 9030 || true; ip -6 rule | grep -e 9027 -e 9029 -e 9030 || true"),
        ("a netfilter table", "nft list tables | grep raven || true"),
        // maps.debug and progs.debug belong to the kernel.
        (
            "a filter",
            "for device in $(ls /sys/class/net); do tc filter show dev $device ingress 2>/dev/null || true; done",
        ),
        ("a pin", "ls /sys/fs/bpf | grep -v debug || true"),
        ("a file", "ls /var/lib/raven"),
        ("an engine", "ls /run/wireguard"),
    ] {
        let left = node.ns.sh(command)?;
        ensure!(left.trim().is_empty(), "{what} is left on {}: {left}", node.name);
    }
    Ok(())
}
