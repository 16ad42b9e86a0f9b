//! Tests of the preshared key: it is read from a file at any time, and a tunnel requires it on both ends.

use std::time::Duration;

use anyhow::{Result, ensure};
use raven_tests::{Node, eventually, proof, require_root};

use crate::Running;

/// Path of the file, beside the private key. In a cluster, the Secret is mounted there.
const FILE: &str = "/var/lib/raven/preshared";
const SOON: Duration = Duration::from_secs(60);
const KEY: &str = "3q2+796tvu/erb7v3q2+796tvu/erb7v3q2+796tvu8=";

/// Changes the file with a command and triggers a reconcile run (the agent reads the file every 30 s by itself). When all
/// peers have `key`, their sessions are ended: one of before continues, and a run that began earlier may still start one.
async fn change_key(node: &Node, command: &str, key: &str) -> Result<()> {
    node.ns.sh(command)?;
    proof::end_sessions(node)?;
    proof::preshared(node, key).await?;
    proof::end_sessions(node)?;
    proof::preshared(node, key).await.map(drop)
}

/// Writes `text` to the file, from which the agent makes `key`.
async fn write_key(node: &Node, text: &str, key: &str) -> Result<()> {
    change_key(node, &format!("umask 077; printf %s '{text}' > {FILE}"), key).await
}

#[tokio::test(flavor = "multi_thread")]
async fn preshared_key_is_applied_at_runtime_and_required_on_both_ends() {
    require_root!();
    let mut running = Running::start().await.expect("start the lab");
    let gateways = ["cloud-a", "x-a", "y-a"];
    for name in gateways {
        let agent = running.agent(name);
        agent.arguments.extend(["--preshared-key-file".to_owned(), FILE.to_owned()]);
        agent.restart().expect("restart the agent");
    }
    let lab = &running.lab;
    for agent in running.agents.iter().filter(|agent| gateways.contains(&agent.node.name.as_str())) {
        running.check(proof::ready(agent).await);
        running.check(proof::preshared(&agent.node, "(none)").await);
    }
    for name in gateways {
        running.check(write_key(lab.node(name), KEY, KEY).await);
    }
    running.check(proof::converged(lab).await);

    // A gateway node with a different key has no sessions; all others are unaffected.
    // The SHA-256 of the text in base64.
    let hash = "5e1MfHOx7NhGKgCtEbTjZeVvOTve6/t5f5MiiCYAYjE=";
    running.check(write_key(lab.node("x-a"), "an arbitrary text", hash).await);
    let (cloud, y) = (lab.pool("cloud").clone(), lab.pool("edge-y").clone());
    // Longer than a new session takes: a handshake is retried after 0.5, 1 and 2 s.
    let mut ping = lab.pod("x-b").ns.command("ping");
    ping.args(["-c", "8", "-i", "1", "-W", "1", &lab.pod("cloud-b").v4.to_string()]);
    let pinged = tokio::process::Command::from(ping).output().await.expect("run ping");
    let output = String::from_utf8_lossy(&pinged.stdout);
    assert!(
        pinged.status.code() == Some(1) && output.contains("8 packets transmitted, 0 received"),
        "x-b still reaches cloud-b: {output}"
    );
    running.check(proof::reach(lab, &cloud, &y, 0).await);

    running.check(write_key(lab.node("x-a"), KEY, KEY).await);
    running.check(proof::converged(lab).await);

    // With an unreadable file, the agent keeps the key, also after a restart.
    running.check(lab.node("x-a").ns.sh(&format!("rm {FILE}; mkdir {FILE}")));
    running.agent("x-a").restart().expect("restart the agent");
    let lab = &running.lab;
    let reported = async || {
        let answer = proof::http(&lab.node("x-a").ns, "127.0.0.1:10275", "/readyz").await?;
        ensure!(answer.contains(FILE), "{answer}");
        Ok(())
    };
    running.check(eventually(SOON, "the agent reports that it cannot read the file", reported).await);
    running.check(proof::preshared(lab.node("x-a"), KEY).await);
    running.check(proof::converged(lab).await);
    running.check(lab.node("x-a").ns.sh(&format!("rmdir {FILE}; touch {FILE}")));

    // The Secret is deleted: the tunnels have no preshared key.
    for name in gateways {
        running.check(change_key(lab.node(name), &format!("rm {FILE}"), "(none)").await);
    }
    running.check(proof::converged(lab).await);
}
