//! Where results go: what would be in the way is known before the work begins.

use super::usage;
use anyhow::Result;
use std::path::Path;

/// What is to be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Output {
    File,
    Directory,
}

/// Refuses what could not be written in the end: a path that is taken, unless it may be replaced by its like; a directory that is not there or
/// may not be written to.
pub(crate) fn check(path: &Path, output: Output, may_replace: bool) -> Result<()> {
    let shown = path.display();
    let Some(_name) = path.file_name() else { return Err(usage(format!("{shown} is no name for an output"))) };
    if let Ok(there) = path.symlink_metadata() {
        let is_directory = path.is_dir();
        let is_dangling = there.is_symlink() && path.metadata().is_err();
        let remedy = if may_replace { "give another name" } else { "--force replaces it" };
        match output {
            Output::File if is_directory => {
                return Err(usage(format!("{shown} is a directory; give the name of a file")));
            }
            Output::Directory if !is_directory => {
                return Err(usage(format!("{shown} is there and is not a directory; give another name")));
            }
            _ if is_dangling && !may_replace => {
                return Err(usage(format!("{shown} is a link to something that is not there; {remedy}")));
            }
            _ if !may_replace => return Err(usage(format!("{shown} exists; {remedy}"))),
            _ => {}
        }
    }
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    if !parent.is_dir() {
        let what = if parent.symlink_metadata().is_ok() { "is not a directory" } else { "does not exist" };
        return Err(usage(format!("{shown} cannot be written: {} {what}", parent.display())));
    }
    // The only way to know is to try: permissions, read-only file systems and full quotas look alike from outside.
    match tempfile::Builder::new().prefix(".bitstack.").suffix(".tmp").tempfile_in(parent) {
        Ok(_) => Ok(()),
        Err(error) => Err(anyhow::Error::new(error).context(format!("{shown} cannot be written"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn what_could_not_be_written_in_the_end_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::write(at("file"), "x").unwrap();
        fs::create_dir(at("dir")).unwrap();
        let says = |name: &str, output, force| match check(&at(name), output, force) {
            Ok(()) => "fine".to_owned(),
            Err(error) => error.to_string().replace(&format!("{}/", dir.path().display()), ""),
        };
        use Output::{Directory, File};
        assert_eq!(says("new", File, false), "fine");
        assert_eq!(says("file", File, false), "file exists; --force replaces it");
        assert_eq!(says("file", File, true), "fine");
        assert_eq!(says("dir", File, true), "dir is a directory; give the name of a file");
        assert_eq!(says("file", Directory, true), "file is there and is not a directory; give another name");
        assert_eq!(says("dir", Directory, false), "dir exists; --force replaces it");
        assert_eq!(says("dir", Directory, true), "fine");
        assert_eq!(says("no/new", File, false), "no/new cannot be written: no does not exist");
        assert_eq!(says("file/new", File, false), "file/new cannot be written: file is not a directory");
        assert!(check(Path::new("/"), File, true).is_err() && check(Path::new("a/.."), File, true).is_err());
        #[cfg(unix)]
        {
            std::os::unix::fs::symlink("nowhere", at("link")).unwrap();
            let expected = "link is a link to something that is not there; --force replaces it";
            assert_eq!(says("link", File, false), expected);
            assert_eq!(says("link", File, true), "fine");
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), if cfg!(unix) { 3 } else { 2 });
    }
}
