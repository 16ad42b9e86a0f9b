//! Metrics that only clients with a token may read.

use anyhow::{Result, ensure};
use raven_tests::{Lab, eventually, require_root};

use crate::SOON;

/// Status code and body of the answer to `curl ARGS` in a node's namespace.
fn get(lab: &Lab, node: &str, args: &str) -> Result<(u16, String)> {
    let text = lab.node(node).ns.sh(&format!("curl -sk -m 5 -w '\\n%{{http_code}}' {args}"))?;
    let (body, code) = text.trim_end().rsplit_once('\n').unwrap_or(("", &text));
    Ok((code.trim().parse()?, body.to_owned()))
}

#[tokio::test(flavor = "multi_thread")]
async fn secure_metrics_need_a_token_that_may_read_them() -> Result<()> {
    require_root!();
    let mut lab = Lab::builder().up().await?;
    let deploy = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy");
    let cluster = lab.cluster();
    cluster.kubectl(&["apply", "-f", &format!("{deploy}/metrics-secure/rbac.yaml")])?;
    for account in ["prometheus", "stranger"] {
        cluster.kubectl(&["create", "serviceaccount", account])?;
    }
    let binding = ["--clusterrole=raven-metrics-reader", "--serviceaccount=default:prometheus"];
    cluster.kubectl(&[&["create", "clusterrolebinding", "prometheus"][..], &binding].concat())?;
    let token =
        |account: &str| Ok::<_, anyhow::Error>(cluster.kubectl(&["create", "token", account])?.trim().to_owned());
    let (prometheus, stranger) = (token("prometheus")?, token("stranger")?);
    let kubeconfig = cluster.agent_kubeconfig(&lab, lab.node("cloud-a")).await?.to_string_lossy().into_owned();
    let flags = ["--kubeconfig", &kubeconfig, "--metrics-secure"].map(str::to_owned);
    let _agent = lab.start_agent_with("cloud-a", flags.to_vec())?;

    let metrics = "https://10.0.0.11:10265/metrics";
    let with = |token: &str, url: &str| get(&lab, "cloud-b", &format!("-H 'Authorization: Bearer {token}' {url}"));
    let refused = || async {
        let (code, body) = get(&lab, "cloud-b", metrics)?;
        ensure!(code == 401 && body.contains("Authorization: Bearer"), "{code} {body}");
        Ok(())
    };
    eventually(SOON, "a client without a token is refused", refused).await?;
    let (code, body) = with(&prometheus, metrics)?;
    ensure!(code == 200 && body.contains("raven_proxy_streams"), "with a token: {code} {body}");
    let (code, body) = with(&stranger, metrics)?;
    ensure!(
        code == 403 && body.contains("system:serviceaccount:default:stranger may not get /metrics"),
        "without the role: {code} {body}"
    );
    // The role permits only /metrics.
    ensure!(with(&prometheus, "https://10.0.0.11:10265/drops")?.0 == 403, "/drops is served");
    ensure!(with("invalid", metrics)?.0 == 401, "an invalid token is accepted");
    ensure!(get(&lab, "cloud-b", "http://10.0.0.11:10265/metrics").is_err(), "plain HTTP is served");

    // On the node itself, also without an API server. Encrypted requests need a token there, too.
    lab.kill_api_server()?;
    let (code, body) = get(&lab, "cloud-a", "http://localhost:10265/metrics")?;
    ensure!(code == 200 && body.contains("raven_proxy_streams"), "on the node: {code} {body}");
    ensure!(get(&lab, "cloud-a", "https://localhost:10265/metrics")?.0 == 401, "TLS on the node needs no token");
    // What the API server answered still holds.
    let bearer = |token: &str| format!("-H 'Authorization: Bearer {token}' {metrics}");
    ensure!(get(&lab, "cloud-b", &bearer(&prometheus))?.0 == 200, "the answer was forgotten");
    let (code, body) = get(&lab, "cloud-b", &bearer("another"))?;
    ensure!(code == 503 && body.contains("cannot ask the API server"), "a new token: {code} {body}");
    Ok(())
}
