//! Tests of outages: forwarding continues without the API server, after a reboot, and after a crash at any point.

use std::{
    net::IpAddr,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use raven_tests::{Lab, Node, eventually, probe, probe::Flow, proof, require_root};

use crate::Running;

#[tokio::test(flavor = "multi_thread")]
async fn api_server_outage_and_agent_restarts_lose_no_packet() {
    require_root!();
    let mut running = Running::start().await.expect("start the lab");
    let (from, to) = (running.lab.pod("x-b").clone(), running.lab.pod("y-b").clone());
    let flow = Flow::start(&from.ns, &to.ns, IpAddr::V4(to.v4), 1000).expect("start the flow");
    // The minute is the tested duration of the outage.
    let end = tokio::time::Instant::now() + Duration::from_secs(60);
    running.lab.kill_api_server().expect("kill the API server");
    for agent in &mut running.agents {
        agent.restart().expect("restart the agent");
    }
    for agent in &running.agents {
        running.check(proof::ready(agent).await);
    }
    tokio::time::sleep_until(end).await;
    running.lab.start_api_server().await.expect("restart the API server");
    let report = running.check(flow.stop().await);
    assert!(report.sent >= 55_000, "{report:?}");
    assert_eq!(report.lost, 0, "{report:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn rebooted_node_forwards_without_api_server() {
    require_root!();
    let mut running = Running::start().await.expect("start the lab");
    running.lab.kill_api_server().expect("kill the API server");
    for node in ["x-a", "x-b"] {
        let agent = running.agent(node);
        agent.kill().expect("kill the agent");
        let ns = agent.node.ns.clone();
        running.check(reboot(&ns));
        running.agent(node).restart().expect("restart the agent");
        let ready = proof::ready(running.agent(node)).await;
        running.check(ready);
    }
    for (from, to) in [("x-b", "cloud-b"), ("y-b", "x-b")] {
        running.check(reached(&running.lab, from, to).await);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn boot_unit_keeps_pods_packets_in_until_the_agent_runs() {
    require_root!();
    let mut running = Running::start().await.expect("start the lab");
    let units = "/var/lib/raven/host-units";
    let node = running.lab.node("x-b").ns.clone();
    let agent = running.agent("x-b");
    agent.arguments.push(format!("--boot-unit-dir={units}"));
    agent.restart().expect("restart the agent");
    let enabled = format!("{units}/multi-user.target.wants/raven-boot.service");
    let installed = || async { node.sh(&format!("cat {enabled} && grep -c unreachable /var/lib/raven/boot6.ip")) };
    let unit = running.check(eventually(Duration::from_secs(10), "the unit is installed", installed).await);
    running.lab.kill_api_server().expect("kill the API server");
    running.agent("x-b").kill().expect("kill the agent");
    // The pods send before the agent starts: without the unit unencrypted, with it not at all.
    running.check(reboot(&node));
    for with_unit in [false, true] {
        if with_unit {
            for command in unit.lines().filter_map(|line| line.strip_prefix("ExecStart=-")) {
                running.check(node.sh(command));
            }
        }
        let internet = proof::record(&running.lab).await.expect("capture the internet");
        let (from, to) = (running.lab.pod("x-b"), running.lab.pod("cloud-b"));
        for address in [IpAddr::from(to.v4), to.v6.into()] {
            assert_eq!(running.check(probe::ping(&from.ns, address).await), None);
        }
        // Proves that the capture works.
        running.check(probe::ping(&node, IpAddr::from([198, 51, 100, 10])).await);
        let internet = internet.stop().await.expect("stop the capture");
        let kept = internet.ensure_nothing_in_clear(running.lab.site(), proof::MARKER);
        assert_eq!(kept.is_ok(), with_unit, "with the unit: {with_unit}: {kept:?}");
    }
    running.agent("x-b").restart().expect("restart the agent");
    running.check(reached(&running.lab, "x-b", "cloud-b").await);
    let agent = running.agent("x-b");
    agent.kill().expect("kill the agent");
    let unit_dir = format!("--boot-unit-dir={units}");
    running.check(running.lab.agent_command("x-b", &[&unit_dir, "cleanup", "--keep-state"]));
    running.check(node.sh(&format!("! ls {enabled} {units}/raven-boot.service /var/lib/raven/boot4.ip 2>/dev/null")));
}

/// Simulates a reboot: removes Raven's state from the kernel and keeps its files.
fn reboot(ns: &raven_tests::Namespace) -> Result<()> {
    ns.sh("rm -f /run/wireguard/raven-wg0.sock; rm -rf /sys/fs/bpf/raven; ip link del raven0; \
           ip rule del pref 100; ip -6 rule del pref 100; ip route flush table 9027; ip -6 route flush table 9027; \
           nft delete table inet raven; \
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

/// Returns Raven's planned state in a node's kernel, in a stable order.
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
async fn agent_killed_at_any_point_restores_state() {
    require_root!();
    let mut running = Running::start().await.expect("start the lab");
    for name in ["x-a", "x-b"] {
        let node = running.lab.node(name).clone();
        let expected = running.check(state(&node));
        for round in 0..12u64 {
            // The node is damaged as by a reboot, and the agent is killed a little later in each round.
            running.agent(name).kill().expect("kill the agent");
            if name == "x-b" || round % 3 == 0 {
                running.check(damage(&node, round));
            }
            let start = Instant::now();
            running.agent(name).restart().expect("restart the agent");
            while start.elapsed() < Duration::from_millis(40 * round) {
                std::hint::spin_loop();
            }
            running.agent(name).kill().expect("kill the agent again");
        }
        running.agent(name).restart().expect("restart the agent for the last time");
        let restored = eventually(Duration::from_secs(20), "the state is complete", || async {
            let now = state(&node)?;
            ensure!(now == expected, "the state is:\n{now}\nexpected:\n{expected}");
            Ok(())
        });
        running.check(restored.await);
        running.check(reached(&running.lab, "cloud-b", "x-b").await);
    }
}

/// Removes a part of Raven's state, which depends on the round.
fn damage(node: &Node, round: u64) -> Result<()> {
    let scripts = [
        "ip link del raven0",
        "ip route flush table 9027; ip -6 rule del pref 100",
        "rm -rf /sys/fs/bpf/raven",
        "nft delete table inet raven; ip rule del pref 100",
    ];
    // The part may be missing already because of the previous round.
    node.ns.sh(&format!("( {} ) 2>/dev/null || true", scripts[usize::try_from(round)? % scripts.len()]))?;
    Ok(())
}

/// The embedded engine gives up a peer after 90 s without an answer and waits for a packet; the site sends
/// none in this test.
#[tokio::test(flavor = "multi_thread")]
async fn idle_site_recovers_after_outage() {
    require_root!();
    let running = Running::start().await.expect("start the lab");
    let router = running.lab.pool("edge-x").router.clone();
    running.check(router.sh("ip link set wan down"));
    // The tested duration of the outage.
    tokio::time::sleep(Duration::from_secs(130)).await;
    // The site's NAT has lost its mappings by then, so the cloud cannot initiate a handshake.
    running.check(
        router.sh("conntrack -F 2>/dev/null; ip link set wan up; ip route replace default via 198.51.100.1 dev wan"),
    );
    let begin = Instant::now();
    running.check(reached(&running.lab, "cloud-b", "x-b").await);
    println!("outage: reached again {} s after the link came back", begin.elapsed().as_secs());
}
