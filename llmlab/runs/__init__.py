"""One run of any stage: from resolved settings to a run folder, and what folders of earlier runs tell."""
