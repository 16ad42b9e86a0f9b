//! A preshared key for the cluster's tunnels: taken from a file at any time, and no tunnel without it.

use std::time::Duration;

use anyhow::{Result, ensure};
use raven_tests::{Node, eventually, privileged, proof};

use crate::Running;

/// Beside the key; in a cluster it is where the Secret is mounted.
const FILE: &str = "/var/lib/raven/preshared";
const SOON: Duration = Duration::from_secs(60);
const OURS: &str = "3q2+796tvu/erb7v3q2+796tvu/erb7v3q2+796tvu8=";

/// Writes the file and lets the agent look (by itself it does every 30 s), for new sessions.
fn give(node: &Node, text: &str) -> Result<()> {
    node.ns.sh(&format!("umask 077; printf %s '{text}' > {FILE}"))?;
    proof::end_sessions(node)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_preshared_key_is_taken_at_any_time_and_both_ends_must_have_it() {
    if !privileged("a_preshared_key_is_taken_at_any_time_and_both_ends_must_have_it") {
        return;
    }
    let mut running = Running::start().await.expect("the lab starts");
    let gateways = ["cloud-a", "x-a", "y-a"];
    for name in gateways {
        let agent = running.agent(name);
        agent.arguments.extend(["--preshared-key-file".to_owned(), FILE.to_owned()]);
        agent.restart().expect("the agent starts");
    }
    let lab = &running.lab;
    for agent in running.agents.iter().filter(|agent| gateways.contains(&agent.node.name.as_str())) {
        running.check(proof::ready(agent).await);
        running.check(proof::preshared(&agent.node, "(none)").await);
    }
    for name in gateways {
        running.check(give(lab.node(name), OURS));
    }
    for name in gateways {
        running.check(proof::preshared(lab.node(name), OURS).await);
    }
    running.check(proof::converged(lab).await);

    // One that has another key is out, and nobody else is.
    running.check(give(lab.node("x-a"), "what somebody made up"));
    // sha256sum's, in base64.
    running.check(proof::preshared(lab.node("x-a"), "CJDOWH9Mn6xxK+BAyAuZHH7x70z+/O3D8QXqCrJLkvY=").await);
    let (cloud, y) = (lab.pool("cloud").clone(), lab.pool("edge-y").clone());
    // Longer than a new session takes: an agent that dials asks again after half a second, one and two.
    let mut ping = lab.pod("x-b").ns.command("ping");
    ping.args(["-c", "8", "-i", "1", "-W", "1", &lab.pod("cloud-b").v4.to_string()]);
    let pinged = tokio::process::Command::from(ping).output().await.expect("ping starts");
    let said = String::from_utf8_lossy(&pinged.stdout);
    assert!(pinged.status.code() == Some(1) && said.contains("8 packets transmitted, 0 received"), "x-b still reaches cloud-b: {said}");
    running.check(proof::reach(lab, &cloud, &y, 0).await);

    running.check(give(lab.node("x-a"), OURS));
    running.check(proof::preshared(lab.node("x-a"), OURS).await);
    running.check(proof::converged(lab).await);

    // A key that cannot be read is no reason to go on without one, for a new agent neither.
    running.check(lab.node("x-a").ns.sh(&format!("rm {FILE}; mkdir {FILE}")));
    running.agent("x-a").restart().expect("the agent starts");
    let lab = &running.lab;
    let says_so = async || {
        let said = proof::http(&lab.node("x-a").ns, "127.0.0.1:10275", "/readyz").await?;
        ensure!(said.contains(FILE), "{said}");
        Ok(())
    };
    running.check(eventually(SOON, "the agent says that it cannot read it", says_so).await);
    running.check(proof::preshared(lab.node("x-a"), OURS).await);
    running.check(proof::converged(lab).await);
    running.check(lab.node("x-a").ns.sh(&format!("rmdir {FILE}; touch {FILE}")));

    // The Secret is gone: as if there had never been one.
    for name in gateways {
        running.check(lab.node(name).ns.sh(&format!("rm {FILE}")));
        running.check(proof::end_sessions(lab.node(name)));
    }
    for name in gateways {
        running.check(proof::preshared(lab.node(name), "(none)").await);
    }
    running.check(proof::converged(lab).await);
}
