//! The reference application of the wire contract (§5, §6) as a configuration: what an existing control plane on Azure runs with
//! when it has no configuration file of its own.

use super::env::Environment;
use super::places::login_server;

/// Either of them says that the environment is meant to be all there is.
const SIGNS: [&str; 2] = ["UPGRADE_GIT_REMOTE", "PLATFORM_ACR_NAME"];

pub(super) fn is_meant(env: &Environment) -> bool {
    SIGNS.iter().any(|name| env.get(name).is_some())
}

/// Everything that the environment itself names is merged in by the reader, as into any file.
pub(super) fn text(env: &Environment) -> String {
    // A name that is no registry's is told by the reader, and must not bend this text.
    let plain = |host: &String| host.bytes().all(|b| b.is_ascii_alphanumeric() || b".-:".contains(&b));
    let host = login_server(env).filter(plain).unwrap_or_default();
    format!(
        r#"application = "control-plane"
platform = "none"

[build]
builder = "az-exec"

[components.api]
repository = "elb-api"
dockerfile = "api/Dockerfile"
context = "."

[components.frontend]
repository = "elb-frontend"
dockerfile = "web/Dockerfile"
context = "."
commit_arg = "GIT_COMMIT"

[components.terminal]
repository = "elb-terminal"
dockerfile = "terminal/Dockerfile.runtime"
context = "terminal"
args = {{ TERMINAL_BASE_IMAGE = "{host}/elb-terminal-base:latest" }}
"#
    )
}
