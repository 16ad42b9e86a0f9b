//! What cannot be had, or is switched off, takes nothing down that works.

use anyhow::{Context, Result};
use kube::{
    Api,
    api::{Patch, PatchParams},
};
use raven_api::{Gateway, gateway::EndpointType};
use raven_tests::{
    eventually, privileged,
    probe::{Echo, Flow},
    proof,
};

use crate::Running;

#[tokio::test(flavor = "multi_thread")]
async fn a_new_port_that_is_taken_leaves_the_tunnel_at_the_old_one() {
    if !privileged("a_new_port_that_is_taken_leaves_the_tunnel_at_the_old_one") {
        return;
    }
    const TAKEN: u16 = 4600;
    let running = Running::start().await.expect("the lab starts");
    let node = running.lab.node("x-a").clone();
    let taken = Echo::on(&node.ns, ([0, 0, 0, 0], TAKEN).into()).expect("somebody takes the port");
    let gateways: Api<Gateway> = Api::all(running.lab.cluster().client());
    let change = async |port: u16| -> Result<()> {
        let mut endpoints = gateways.get("edge-x").await?.spec.endpoints;
        endpoints.iter_mut().filter(|e| e.type_ == EndpointType::Tunnel).for_each(|e| e.port = Some(i32::from(port)));
        let patch = serde_json::json!({ "spec": { "endpoints": endpoints } });
        gateways.patch("edge-x", &PatchParams::default(), &Patch::Merge(&patch)).await.map(drop).context("change edge-x")
    };
    let (from, to) = (running.lab.pod("x-b"), running.lab.pod("cloud-b"));
    let flow = Flow::start(&from.ns, &to.ns, to.v4.into(), 500).expect("the flow starts");
    running.check(change(TAKEN).await);
    running.says("the port is named", |status, m| status == "False" && m.contains(&TAKEN.to_string())).await;
    let report = running.check(flow.stop().await);
    assert_eq!(report.lost, 0, "{report:?}");
    let programs = running.check(node.ns.sh("ls /sys/fs/bpf/raven/v1/links 2>/dev/null; tc filter show dev raven-wg0 ingress"));
    assert!(programs.contains("tunnel_ingress"), "what peers send is checked still: {programs}");
    drop(taken);
    running.says("it is taken as soon as it is free", |status, _| status == "True").await;
    let listening = running.check(node.ns.sh("ss -lunH"));
    assert!(listening.contains(&format!(":{TAKEN} ")), "{listening}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_with_ipv6_switched_off_keeps_ipv4() {
    if !privileged("a_node_with_ipv6_switched_off_keeps_ipv4") {
        return;
    }
    let mut running = Running::start().await.expect("the lab starts");
    for node in ["x-a", "x-b"] {
        running.agent(node).kill().expect("the agent dies");
        let ns = running.lab.node(node).ns.clone();
        // As hardened systems have it, from the boot on: our devices are made after it.
        running.check(running.lab.agent_command(node, &["cleanup", "--keep-state"]));
        running.check(ns.sh("sysctl -qw net.ipv6.conf.all.disable_ipv6=1 net.ipv6.conf.default.disable_ipv6=1"));
        running.agent(node).restart().expect("the agent starts");
    }
    let (cloud, edge) = (running.lab.pool("cloud").clone(), running.lab.pool("edge-x").clone());
    let talks = eventually(std::time::Duration::from_secs(30), "IPv4 works", || proof::reach(&running.lab, &cloud, &edge, 0));
    running.check(talks.await);
    for node in ["x-a", "x-b"] {
        let ready = proof::ready(running.agent(node)).await;
        running.check(ready);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_engine_that_hangs_is_started_anew() {
    if !privileged("an_engine_that_hangs_is_started_anew") {
        return;
    }
    let running = Running::start().await.expect("the lab starts");
    // Sockets of one node's network namespace: its own engine's.
    let stopped = "kill -STOP $(ss -Hxlp | grep raven-wg0.sock | grep -o 'pid=[0-9]*' | head -n 1 | cut -d= -f2)";
    running.check(running.lab.node("x-a").ns.sh(stopped));
    let (cloud, edge) = (running.lab.pool("cloud").clone(), running.lab.pool("edge-x").clone());
    // Half a minute until somebody asks it, ten seconds until it is given up.
    let talks = eventually(std::time::Duration::from_secs(90), "the pools talk again", || proof::reach(&running.lab, &cloud, &edge, 0));
    running.check(talks.await);
}
