//! Tests of the userspace engine in a Pod of its own (DaemonSet `raven-wireguard`).

use std::time::Duration;

use anyhow::{Result, ensure};
use nix::sys::signal::Signal;
use raven_tests::{
    Lab,
    agent::{self, Agent},
    eventually, patience,
    probe::Flow,
    process::Process,
    proof, require_root,
};

use crate::Running;

/// Starts the engines of all nodes, as the DaemonSet does.
fn start_engines(lab: &Lab) -> Result<Vec<Process>> {
    lab.nodes.iter().map(|node| start_engine(lab, &node.name)).collect()
}

fn start_engine(lab: &Lab, node: &str) -> Result<Process> {
    let mut command = lab.node(node).ns.command(agent::binary("raven-agent")?);
    command.arg("wireguard");
    Process::start(format!("engine-{node}"), &lab.logs(), command)
}

/// Starts a lab whose agents use the engines of other containers, and waits until all pools are connected.
async fn start() -> Result<(Running, Vec<Process>)> {
    let lab = Lab::builder().up().await?;
    let engines = start_engines(&lab)?;
    let mut running = Running::begin(lab).await?;
    for agent in &mut running.agents {
        agent.contain();
        agent.arguments.push("--wireguard-engine=external".to_owned());
        agent.restart()?;
    }
    running.check(proof::converged(&running.lab).await.map(drop));
    Ok((running, engines))
}

#[tokio::test(flavor = "multi_thread")]
async fn engine_outlives_the_agents_container() {
    require_root!();
    let (mut running, mut engines) = start().await.expect("start the lab");
    // The engine of a member has no peers, and stays.
    let idle = running.lab.node("x-b").ns.clone();
    let index = |running: &Running| running.check(idle.sh("cat /sys/class/net/raven-wg0/ifindex"));
    let before = index(&running);
    let Running { agents, lab, .. } = &mut running;
    let replaced = proof::lossless(lab, &[("x-b", "y-b"), ("y-b", "x-b")], 0, 1000, async || {
        // All of them end with all of their processes, as in `kubectl delete pod` of every agent.
        agents.iter_mut().try_for_each(Agent::kill)?;
        agents.iter_mut().try_for_each(Agent::restart)?;
        for agent in agents.iter() {
            proof::ready(agent).await?;
        }
        Ok(String::new())
    });
    let replaced = replaced.await;
    running.check(replaced);
    assert_eq!(index(&running), before, "the device of the member's engine was recreated");
    for (node, engine) in running.lab.nodes.iter().zip(&mut engines) {
        running.check(engine.ensure_running());
        running.check(running.lab.agent_command(&node.name, &["wireguard", "--check"]).map(drop));
    }

    // An upgrade of a gateway node's engine: the device stays, and the agent configures the new engine at once. x-a dials
    // its peers; cloud-a is dialled, and its peers continue their sessions with the previous engine.
    for name in ["x-a", "cloud-a"] {
        replaced_engine(&running, &mut engines, name).await;
    }
}

/// Replaces the engine of a gateway node under traffic in both directions.
async fn replaced_engine(running: &Running, engines: &mut [Process], name: &str) {
    let lab = &running.lab;
    let index = || running.check(lab.node(name).ns.sh("cat /sys/class/net/raven-wg0/ifindex"));
    let before = index();
    let flows = [("x-b", "cloud-b"), ("cloud-b", "x-b")].map(|(from, to)| {
        let (from, to) = (lab.pod(from), lab.pod(to));
        Flow::start(&from.ns, &to.ns, to.v4.into(), 500).expect("start the flow")
    });
    let place = lab.nodes.iter().position(|node| node.name == name).expect("the node");
    engines[place].signal(Signal::SIGTERM).expect("signal the engine");
    let ended = engines[place].wait().expect("wait for the engine");
    assert!(ended.success(), "{ended}");
    let without = index();
    engines[place] = start_engine(lab, name).expect("start the next engine");
    running.check(proof::converged(lab).await.map(drop));
    assert_eq!([&without, &index()], [&before, &before], "the device was recreated");
    for flow in flows {
        let report = running.check(flow.stop().await);
        println!("the engine of {name} is replaced: {report:?}");
        assert!(report.longest_gap < Duration::from_secs(3).mul_f64(patience()), "{report:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_engine_is_named_and_configured_again_and_nothing_leaks() {
    require_root!();
    let (mut running, mut engines) = start().await.expect("start the lab");
    let lab = &running.lab;
    let internet = proof::record(lab).await.expect("capture the internet");
    let (from, to) = (lab.pod("x-a"), lab.pod("cloud-b"));
    let flow = Flow::start(&from.ns, &to.ns, to.v4.into(), 500).expect("start the flow");
    let place = lab.nodes.iter().position(|node| node.name == "x-a").expect("the node");
    engines[place].kill().expect("kill the engine");
    let node = lab.node("x-a");
    let named = eventually(Duration::from_secs(60), "/readyz names the missing engine", || async {
        let body = node.ns.sh("curl -s localhost:10275/readyz")?;
        ensure!(body.contains("DaemonSet raven-wireguard"), "{body}");
        Ok(())
    });
    running.check(named.await);
    engines[place] = start_engine(lab, "x-a").expect("restart the engine");
    running.check(proof::converged(lab).await.map(drop));
    running.check(flow.stop().await);
    let internet = internet.stop().await.expect("stop the capture");
    running.check(proof::encrypted(lab, &internet).map(drop));
    // A killed engine leaves its socket, which cleanup removes.
    engines[place].kill().expect("kill the engine");
    let Running { agents, lab, .. } = &mut running;
    let agent = agents.iter_mut().find(|agent| agent.node.name == "x-a").expect("the node has an agent");
    let cleaned = proof::cleaned(lab, agent);
    running.check(cleaned);
}
