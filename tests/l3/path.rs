//! Tests of the path: traceroute shows the gateway nodes, and packets are not fragmented.

use raven_common::Verdict;
use raven_tests::{capture::Capture, proof, require_root};

use crate::Running;

#[tokio::test(flavor = "multi_thread")]
async fn traceroute_shows_every_gateway_node() {
    require_root!();
    let running = Running::start().await.expect("start the lab");
    println!("traceroute: {}", running.check(proof::traceroute(&running.lab)));
}

#[tokio::test(flavor = "multi_thread")]
async fn packets_are_not_fragmented() {
    require_root!();
    let running = Running::start().await.expect("start the lab");
    let seen = proof::unfragmented(&running.lab, 5_000_000).await;
    println!("wire: {}", running.check(seen));
}

/// The path's MTU is smaller than the sender's node expects (for example because of a provider's tunnel), so the MSS of
/// the SYN is too large. The first large segments cause an ICMP error, and TCP adapts.
#[tokio::test(flavor = "multi_thread")]
async fn tcp_adapts_to_path_mtu_below_its_mss() {
    require_root!();
    const NARROW: u32 = 1320;
    let mut running = Running::start().await.expect("start the lab");
    running.agent("x-a").kill().expect("kill the agent, which would restore the MTU");
    let lab = &running.lab;
    let gateway = &lab.node("x-a").ns;
    let map = "/sys/fs/bpf/raven/v1/maps/CONFIG";
    let config =
        running.check(gateway.run("bpftool", &["-j", "map", "lookup", "pinned", map, "key", "0", "0", "0", "0"]));
    let config: serde_json::Value = serde_json::from_str(&config).expect("bpftool prints JSON");
    let mut value: Vec<String> = config["value"]
        .as_array()
        .expect("an array of bytes")
        .iter()
        .map(|b| b.as_str().expect("a hexadecimal byte").to_owned())
        .collect();
    // The field `tunnel_mtu`.
    let narrow = NARROW.to_ne_bytes().map(|byte| format!("{byte:#04x}"));
    value[16..20].clone_from_slice(&narrow);
    running.check(gateway.sh(&format!("bpftool map update pinned {map} key 0 0 0 0 value {}", value.join(" "))));
    let routes = "route show table 9027 dev raven-wg0 | sed 's/ mtu [0-9]*//'";
    for ip in ["ip", "ip -6"] {
        running.check(gateway.sh(&format!(
            "{ip} {routes} | while read route; do {ip} route replace table 9027 $route dev raven-wg0 mtu {NARROW}; done"
        )));
    }
    let lan = running.check(Capture::start(lab.site(), &lab.node("x-b").ns, "eth0", proof::FRAGMENTS).await);
    let before = running.check(proof::counters(lab.node("x-a")));
    let from = lab.pod("x-b");
    for (family, address) in lab.pod("cloud-b").addresses().into_iter().enumerate() {
        running.check(proof::bulk(lab, "x-b", "cloud-b", family, 5_000_000).await);
        let learned = running.check(from.ns.sh(&format!("ip route get {address}")));
        assert!(learned.contains(&format!("mtu {NARROW}")), "the sender has not learned the MTU: {learned}");
    }
    let after = running.check(proof::counters(lab.node("x-a")));
    let (large, fast) = (
        proof::increase(&before, &after, Verdict::StackTooBig),
        proof::increase(&before, &after, Verdict::ToTunnelFast),
    );
    assert!(large > 0 && fast > 50 * large, "{large} packets were too large, {fast} were redirected: {after:?}");
    let recording = running.check(lan.stop().await);
    assert_eq!(running.check(recording.lines("")), Vec::<String>::new(), "there are fragments");
}

/// A site's link carries less than its nodes' uplinks. With the limit on the site's nodes only, packets of both directions
/// fit, and no WireGuard packet is fragmented.
#[tokio::test(flavor = "multi_thread")]
async fn limited_tunnel_mtu_fits_a_narrow_link() {
    require_root!();
    const LIMIT: u32 = 1300;
    let mut running = Running::start().await.expect("start the lab");
    // As behind two providers' tunnels.
    let router = running.lab.pool("edge-x").router.clone();
    running.check(router.sh("ip link set wan mtu 1380"));
    running.check(running.lab.inet.sh("ip link set edge-x mtu 1380"));
    for node in ["x-a", "x-b"] {
        let agent = running.agent(node);
        agent.arguments.push(format!("--tunnel-mtu={LIMIT}"));
        agent.restart().expect("restart the agent");
        let ready = proof::ready(running.agent(node)).await;
        running.check(ready);
    }
    let lab = &running.lab;
    let device = running.check(lab.node("x-a").ns.run("ip", &["link", "show", "raven-wg0"]));
    assert!(device.contains(&format!("mtu {LIMIT} ")), "{device}");
    let route = running.check(lab.node("x-b").ns.run("ip", &["route", "show", "table", "9027", "type", "unicast"]));
    assert!(!route.is_empty() && route.lines().all(|line| line.contains(&format!("mtu {LIMIT}"))), "{route}");
    let fragments = running.check(Capture::start(lab.site(), &lab.inet, "wire", proof::FRAGMENTS).await);
    for family in 0..proof::FAMILIES.len() {
        running.check(proof::bulk(lab, "x-b", "cloud-b", family, 5_000_000).await);
        running.check(proof::bulk(lab, "cloud-b", "x-b", family, 5_000_000).await);
    }
    let recording = running.check(fragments.stop().await);
    assert_eq!(running.check(recording.lines("")), Vec::<String>::new(), "there are fragments");
}
