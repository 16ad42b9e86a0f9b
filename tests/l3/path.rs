//! The path as a person sees it: traceroute shows the gateway nodes; nothing is fragmented on the wire.

use raven_common::Verdict;
use raven_tests::{capture::Capture, privileged, proof};

use crate::Running;

#[tokio::test(flavor = "multi_thread")]
async fn traceroute_shows_every_gateway_node() {
    if !privileged("traceroute_shows_every_gateway_node") {
        return;
    }
    let running = Running::start().await.expect("the lab starts");
    println!("traceroute: {}", running.check(proof::traceroute(&running.lab)));
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_fragmented_on_the_wire() {
    if !privileged("nothing_is_fragmented_on_the_wire") {
        return;
    }
    let running = Running::start().await.expect("the lab starts");
    let seen = proof::unfragmented(&running.lab, 5_000_000).await;
    println!("wire: {}", running.check(seen));
}

/// A path that is narrower than the sender's node knows (a tunnel of a provider in between): the SYN said too much, so the first large
/// segments bring an ICMP message back, and TCP adapts.
#[tokio::test(flavor = "multi_thread")]
async fn a_transfer_adapts_to_a_path_that_is_narrower_than_its_syn_said() {
    if !privileged("a_transfer_adapts_to_a_path_that_is_narrower_than_its_syn_said") {
        return;
    }
    const NARROW: u32 = 1320;
    let mut running = Running::start().await.expect("the lab starts");
    running.agent("x-a").kill().expect("the agent dies, or it would mend this");
    let lab = &running.lab;
    let gateway = &lab.node("x-a").ns;
    let map = "/sys/fs/bpf/raven/v1/maps/CONFIG";
    let config = running.check(gateway.run("bpftool", &["-j", "map", "lookup", "pinned", map, "key", "0", "0", "0", "0"]));
    let config: serde_json::Value = serde_json::from_str(&config).expect("bpftool writes JSON");
    let mut value: Vec<String> = config["value"].as_array().expect("bytes").iter().map(|b| b.as_str().expect("hex").to_owned()).collect();
    // Field `tunnel_mtu`.
    let narrow = NARROW.to_ne_bytes().map(|byte| format!("{byte:#04x}"));
    value[16..20].clone_from_slice(&narrow);
    running.check(gateway.sh(&format!("bpftool map update pinned {map} key 0 0 0 0 value {}", value.join(" "))));
    let routes = "route show table 9027 dev raven-wg0 | sed 's/ mtu [0-9]*//'";
    for ip in ["ip", "ip -6"] {
        running
            .check(gateway.sh(&format!(
                "{ip} {routes} | while read route; do {ip} route replace table 9027 $route dev raven-wg0 mtu {NARROW}; done"
            )));
    }
    let lan = running.check(Capture::start(lab.site(), &lab.node("x-b").ns, "eth0", proof::FRAGMENTS).await);
    let before = running.check(proof::counters(lab.node("x-a")));
    let from = lab.pod("x-b");
    for (family, address) in lab.pod("cloud-b").addresses().into_iter().enumerate() {
        running.check(proof::bulk(lab, "x-b", "cloud-b", family, 5_000_000).await);
        let learned = running.check(from.ns.sh(&format!("ip route get {address}")));
        assert!(learned.contains(&format!("mtu {NARROW}")), "the sender has learned it: {learned}");
    }
    let after = running.check(proof::counters(lab.node("x-a")));
    let (large, fast) = (proof::grown(&before, &after, Verdict::StackTooBig), proof::grown(&before, &after, Verdict::ToTunnelFast));
    assert!(large > 0 && fast > 50 * large, "{large} packets were too large, {fast} went on as ever: {after:?}");
    let recording = running.check(lan.stop().await);
    assert_eq!(running.check(recording.lines("")), Vec::<String>::new(), "no fragment");
}
