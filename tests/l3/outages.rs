//! Without the API server, after a reboot, after a crash at any point: packets go on.

use std::{
    net::IpAddr,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use raven_tests::{Lab, Node, eventually, privileged, probe, probe::Flow, proof};

use crate::Running;

#[tokio::test(flavor = "multi_thread")]
async fn a_minute_without_the_api_server_and_restarted_agents_lose_nothing() {
    if !privileged("a_minute_without_the_api_server_and_restarted_agents_lose_nothing") {
        return;
    }
    let mut running = Running::start().await.expect("the lab starts");
    let (from, to) = (running.lab.pod("x-b").clone(), running.lab.pod("y-b").clone());
    let flow = Flow::start(&from.ns, &to.ns, IpAddr::V4(to.v4), 1000).expect("the flow starts");
    // The minute is the promise, not something that is waited for.
    let end = tokio::time::Instant::now() + Duration::from_secs(60);
    running.lab.kill_api_server().expect("the API server dies");
    for agent in &mut running.agents {
        agent.restart().expect("the agent starts again");
    }
    for agent in &running.agents {
        running.check(proof::ready(agent).await);
    }
    tokio::time::sleep_until(end).await;
    running.lab.start_api_server().await.expect("the API server comes back");
    let report = running.check(flow.stop().await);
    assert!(report.sent >= 55_000, "{report:?}");
    assert_eq!(report.lost, 0, "{report:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rebooted_node_forwards_without_the_api_server() {
    if !privileged("a_rebooted_node_forwards_without_the_api_server") {
        return;
    }
    let mut running = Running::start().await.expect("the lab starts");
    running.lab.kill_api_server().expect("the API server dies");
    for node in ["x-a", "x-b"] {
        let agent = running.agent(node);
        agent.kill().expect("the agent dies");
        let ns = agent.node.ns.clone();
        running.check(forget(&ns));
        running.agent(node).restart().expect("the agent starts again");
        let ready = proof::ready(running.agent(node)).await;
        running.check(ready);
    }
    for (from, to) in [("x-b", "cloud-b"), ("y-b", "x-b")] {
        running.check(reached(&running.lab, from, to).await);
    }
}

/// What a reboot does to a node: everything in the kernel is gone, files stay.
fn forget(ns: &raven_tests::Namespace) -> Result<()> {
    ns.sh("rm -f /run/wireguard/raven-wg0.sock; rm -rf /sys/fs/bpf/raven; ip link del raven0; \
           ip rule del pref 100; ip -6 rule del pref 100; nft delete table inet raven; \
           while ip link show raven-wg0 >/dev/null 2>&1; do :; done; ip link set eth0 xdp off")?;
    Ok(())
}

async fn reached(lab: &Lab, from: &str, to: &str) -> Result<()> {
    for address in lab.pod(to).addresses() {
        eventually(proof::CONVERGENCE, &format!("{from} reaches {address} of {to}"), || async {
            probe::ping(&lab.pod(from).ns, address).await?.context("no answer")
        })
        .await?;
    }
    Ok(())
}

/// Everything of ours in a node's kernel that a plan decides, in an order that does not vary.
fn state(node: &Node) -> Result<String> {
    let maps = ["REMOTE4", "REMOTE6", "LOCAL4", "LOCAL6", "NODES"];
    let dump = |map: &&str| {
        format!(
            "bpftool map dump pinned /sys/fs/bpf/raven/v1/maps/{map} | tr -d '\\n ' | sed 's/}},{{/}}\\n{{/g' | sed '1s/^.//; $s/.$//' | sort"
        )
    };
    let script = [
        "ip -o addr show dev raven0 scope global | sed 's/^[0-9]*: //; s/valid_lft.*//'",
        "ip route show table 9027; ip -6 route show table 9027; ip rule show pref 100; ip -6 rule show pref 100",
        "wg show raven-wg0 allowed-ips 2>/dev/null | tr ' ' '\\n' | sort || true",
        "nft list table inet raven",
        "ls /sys/fs/bpf/raven/v1/links | sed 's/-[0-9]*$//'",
    ];
    let script = script.map(str::to_owned).into_iter().chain(maps.iter().map(dump)).collect::<Vec<_>>().join("\n");
    node.ns.sh(&script)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_was_killed_at_any_point_repairs_what_it_finds() {
    if !privileged("an_agent_that_was_killed_at_any_point_repairs_what_it_finds") {
        return;
    }
    let mut running = Running::start().await.expect("the lab starts");
    for name in ["x-a", "x-b"] {
        let node = running.lab.node(name).clone();
        let whole = running.check(state(&node));
        for round in 0..12u64 {
            // A node as a reboot leaves it, and an agent that dies a little later each time.
            running.agent(name).kill().expect("the agent dies");
            if name == "x-b" || round % 3 == 0 {
                running.check(damage(&node, round));
            }
            let start = Instant::now();
            running.agent(name).restart().expect("the agent starts");
            while start.elapsed() < Duration::from_millis(40 * round) {
                std::hint::spin_loop();
            }
            running.agent(name).kill().expect("the agent dies again");
        }
        running.agent(name).restart().expect("the last agent starts");
        let repaired = eventually(Duration::from_secs(20), "the state is whole again", || async {
            let now = state(&node)?;
            ensure!(now == whole, "it is:\n{now}\nand was:\n{whole}");
            Ok(())
        });
        running.check(repaired.await);
        running.check(reached(&running.lab, "cloud-b", "x-b").await);
    }
}

/// Takes one thing or another away.
fn damage(node: &Node, round: u64) -> Result<()> {
    let scripts = [
        "ip link del raven0",
        "ip route flush table 9027; ip -6 rule del pref 100",
        "rm -rf /sys/fs/bpf/raven",
        "nft delete table inet raven; ip rule del pref 100",
    ];
    // What is gone already, from the round before, need not go again.
    node.ns.sh(&format!("( {} ) 2>/dev/null || true", scripts[usize::try_from(round)? % scripts.len()]))?;
    Ok(())
}

/// The embedded engine gives a peer up after 90 s without an answer, and waits for a packet; nobody at the site sends one here.
#[tokio::test(flavor = "multi_thread")]
async fn a_site_that_was_cut_off_for_minutes_is_reached_again_though_nobody_there_says_a_word() {
    if !privileged("a_site_that_was_cut_off_for_minutes_is_reached_again_though_nobody_there_says_a_word") {
        return;
    }
    let running = Running::start().await.expect("the lab starts");
    let router = running.lab.pool("edge-x").router.clone();
    running.check(router.sh("ip link set wan down"));
    // How long it lasts is what is tested, nothing that is waited for.
    tokio::time::sleep(Duration::from_secs(130)).await;
    // The site's NAT has forgotten by then: the cloud cannot be the one who knocks.
    running.check(router.sh("conntrack -F 2>/dev/null; ip link set wan up; ip route replace default via 198.51.100.1 dev wan"));
    let begin = Instant::now();
    running.check(reached(&running.lab, "cloud-b", "x-b").await);
    println!("outage: reached again {} s after the link came back", begin.elapsed().as_secs());
}
